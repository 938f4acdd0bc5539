// The stage editor of Apply Stages and Stage Schedule: the two strengths over the run, drawn by the server's own code
// (sampling/stage_editor.py). It holds no value: dragging sets the widgets of the nodes, which the queue and files read.
import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"
import { Drawing, NAMES, STYLE, element } from "./stage_drawing.js"
import {
    KEYFRAME, KINDS, SCHEDULE_WIDGETS, addKeyframe, change, graphOf, lastOf, nodeOf, removeKeyframe, setValue, unused,
    widgetOf,
} from "./stage_graph.js"

const STEP = 0.01 // of a widget; ten times with Shift
const editors = new Set()
const lastRuns = new Map() // what the last run of a node said; undo makes all nodes anew

class StageEditor {
    constructor(node) {
        this.node = node
        this.now = null // position of the step that runs
        this.running = false
        this.plan = null
        this.unused = "" // why its node does not run
        this.root = document.createElement("div")
        this.root.className = "subject-stages"
        this.svg = element("svg", { role: "group" })
        this.text = document.createElement("output")
        this.add = this.button("+ keyframe", "Add a keyframe to the schedule", () => this.addKeyframe())
        this.remove = this.button("− keyframe", "Remove the last keyframe of the schedule", () => this.removeKeyframe(this.lastNode()))
        const row = document.createElement("div")
        row.className = "row"
        row.append(this.add, this.remove)
        this.root.append(this.svg, row, this.text)
        new ResizeObserver(() => this.draw()).observe(this.svg)
        // else Nodes 2.0 would drag the node, and a canvas behind would pan or select
        for (const name of ["pointerdown", "mousedown", "dblclick", "contextmenu"])
            this.root.addEventListener(name, (event) => event.stopPropagation())
        this.widget = node.addDOMWidget("stage_editor", "subject_stages", this.root, {
            serialize: false, hideOnZoom: false, getMinHeight: () => 130, getValue: () => "", setValue: () => {},
            hideInPanel: true, // of properties, which would show an empty one
        })
        // the panel of front ends without that option gives the node's own widget the panel's width
        Object.defineProperty(this.widget, "width", { get: () => undefined, set: () => {} })
        this.widget.serialize = false // neither in files nor in the queue
    }

    button(text, title, act) {
        const made = document.createElement("button")
        made.type = "button"
        made.textContent = text
        made.title = title
        made.setAttribute("aria-label", title)
        made.addEventListener("click", act)
        return made
    }

    /** Whether its node is there. Undo makes nodes anew, but Nodes 2.0 goes on showing the elements of the old ones. */
    isAlive() {
        if (this.node.graph) return true
        const anew = this.root.isConnected && nodeOf(app.canvas.graph, this.node.id)
        if (anew && KINDS.includes(anew.type)) this.node = anew
        return Boolean(this.node.graph)
    }

    /** Of the node, among all workflows of this page. */
    name() {
        return `${app.graph.id} ${this.node.id}`
    }

    /** Asks the server when something changed that it reads; while an answer is under way, once more behind it. */
    async refresh() {
        if (this.asking || !this.node.graph || !this.root.isConnected) return
        if (this.unused !== unused(this.node)) {
            this.unused = unused(this.node)
            this.draw()
        }
        if (this.unused) return
        const request = JSON.stringify({
            graph: graphOf(this.node.graph), node: String(lastOf(this.node).id), last: lastRuns.get(this.name()),
        })
        if (request === this.asked) return
        if (this.now === null) this.live = "" // of a run that has ended
        this.asking = true
        this.asked = request
        try {
            const response = await api.fetchApi("/subject_dla/stages", {
                method: "POST", headers: { "Content-Type": "application/json" }, body: request,
            })
            const answer = await response.json()
            this.wrong = answer.error ?? ""
            if (!this.wrong) this.plan = answer
        } catch {
            this.wrong = "The server does not answer."
            this.asked = null
        }
        this.asking = false
        this.draw()
    }

    draw() {
        const { plan } = this
        this.say(this.unused || this.wrong || this.live || this.summary(), Boolean(this.wrong && !this.unused))
        if (!plan || !this.node.graph) return
        this.grey()
        if (!this.svg.clientWidth) return
        this.drawing = new Drawing(plan, this.svg)
        const focused = this.svg.contains(document.activeElement) ? document.activeElement.dataset.handle : null
        this.svg.setAttribute("viewBox", `0 0 ${this.drawing.width} ${this.drawing.height}`)
        this.svg.setAttribute("aria-label", `Stage schedule. ${plan.text}`)
        const handles = plan.keyframes.flatMap((key, index) => this.handles(key, index))
        this.svg.replaceChildren(...this.drawing.lanes(this.now), ...handles)
        if (focused) this.svg.querySelector(`[data-handle="${focused}"]`)?.focus()
        this.remove.disabled = this.lastNode()?.type !== KEYFRAME
    }

    /** The node of the last keyframe. */
    lastNode() {
        return nodeOf(this.node.graph, this.plan?.keyframes.at(-1).node)
    }

    summary() {
        return this.plan ? [this.plan.text, ...this.plan.notes].filter(Boolean).join("\n") : ""
    }

    say(text, wrong = false) {
        this.text.classList.toggle("wrong", wrong)
        this.text.setAttribute("aria-live", wrong ? "polite" : "off") // not every step of a run is read out
        if (this.text.textContent !== text) this.text.textContent = text
    }

    /** What is not read is greyed out: thresholds of the preset, or all where a schedule is connected; on an error none. */
    grey() {
        for (const [id, reads] of Object.entries(this.plan.reads)) {
            const node = nodeOf(this.node.graph, id)
            for (const name of SCHEDULE_WIDGETS) {
                const widget = widgetOf(node, name)
                const disabled = !this.wrong && !reads.includes(name)
                if (!widget || !!widget.disabled === disabled) continue
                widget.disabled = disabled
                widget.options.disabled = widget.disabled // what Nodes 2.0 of 1.32 reads,
                node.widgets.push(node.widgets.pop()) // once the list of widgets changes
                node.setDirtyCanvas(true, true)
            }
        }
    }

    /** The sliders of a keyframe: its start, and of a Stage Keyframe its two strengths. */
    handles(key, index) {
        const found = []
        const owner = nodeOf(this.node.graph, key.node)
        if (!owner) return found // removed while the server answered, which is asked again
        const title = `${owner.title}, keyframe ${index + 1}`
        if (key.start_input && index > 0) {
            const range = this.limits(index)
            found.push(this.handle(owner, key.start_input, `${title}, start`, key.start, range, "", this.drawing.bar(index)))
        }
        for (const [name, label] of Object.entries(NAMES)) {
            const input = key[`${name}_input`]
            const parts = this.drawing.dot(key, index, name)
            if (input) found.push(this.handle(owner, input, `${title}, ${label}`, key[name], [0, 2], name, parts))
        }
        return found
    }

    /** Least and most of a start: between its neighbours, as the schedule must stay in order. */
    limits(index) {
        const { keyframes, clock } = this.plan
        const before = index > 1 ? keyframes[index - 1].start : clock.start
        const after = keyframes[index + 1]?.start ?? clock.end
        const [least, most] = before < after ? [before, after] : [after, before]
        return [least + (least > 0 ? STEP : 0), most - (most < 1 ? STEP : 0)].map((value) => Math.round(value * 100) / 100)
    }

    /** A slider of a widget; with the name of a lane, it goes up and down there, else along the run. */
    handle(owner, input, label, value, [least, most], lane, parts) {
        const across = !lane
        const made = element("g", {
            class: across ? "handle" : `handle up ${lane}`, tabindex: 0, role: "slider", "data-handle": `${owner.id} ${input}`,
            "aria-label": label, "aria-valuemin": least, "aria-valuemax": most, "aria-valuenow": value,
            "aria-valuetext": `${value.toFixed(2)}${across ? ` on the clock ${this.plan.clock.name}` : ""}`,
            "aria-orientation": across ? "horizontal" : "vertical",
        }, ...parts)
        const set = (wanted) => {
            const rounded = Math.round(Math.min(most, Math.max(least, wanted)) * 100) / 100
            setValue(owner, input, rounded)
            this.refresh()
        }
        made.addEventListener("pointerdown", (event) => {
            if (event.button !== 0) return
            event.preventDefault()
            made.focus()
            app.canvas.emitBeforeChange()
            // listened to at the window, since every answer of the server draws the handles anew
            const move = (moved) => set(this.drawing.valueAt(moved, lane))
            const up = () => {
                window.removeEventListener("pointermove", move, true)
                window.removeEventListener("pointerup", up, true)
                window.removeEventListener("pointercancel", up, true)
                app.canvas.emitAfterChange()
            }
            window.addEventListener("pointermove", move, true)
            window.addEventListener("pointerup", up, true)
            window.addEventListener("pointercancel", up, true)
        })
        made.addEventListener("keydown", (event) => {
            const [less, more] = across && this.plan.clock.end < this.plan.clock.start
                ? ["ArrowRight", "ArrowLeft"] : ["ArrowLeft", "ArrowRight"]
            if (event.key === "Delete" || event.key === "Backspace") {
                event.stopPropagation() // else the canvas deletes the selected node
                event.preventDefault()
                this.removeKeyframe(owner)
            }
            const way = { [less]: -1, [more]: 1, ArrowDown: -1, ArrowUp: 1 }[event.key]
            const ends = { Home: least, End: most }[event.key]
            if (way === undefined && ends === undefined) return
            event.preventDefault()
            event.stopPropagation() // else the canvas moves the node
            const current = widgetOf(owner, input).value
            change(() => set(ends ?? current + way * STEP * (event.shiftKey ? 10 : 1)))
        })
        return made
    }

    addKeyframe() {
        if (!this.plan) return
        change(() => addKeyframe(this.node.graph, this.plan))
        this.refresh()
    }

    removeKeyframe(key) {
        if (key?.type !== KEYFRAME) return
        change(() => removeKeyframe(key))
        this.refresh()
    }

    /** After a run whose last step was not shown: it was stopped, or its sampler taken away. */
    end() {
        if (!this.running) return
        this.running = false
        this.now = null
        this.live = ""
        this.draw()
    }

    /** What a run says of itself; ids of nodes inside subgraphs end in the node's own. */
    follow({ nodes, begin, text, step, steps }) {
        const ids = nodes.map((id) => String(id).split(":").pop())
        if (!ids.includes(String(this.node.id)) && !ids.includes(this.plan?.run?.node)) return
        if (begin) lastRuns.set(this.name(), begin)
        const done = step === undefined ? 0 : step / steps
        const at = this.plan?.steps[step ?? 0]
        this.now = done < 1 && at ? at[0] : null
        this.live = text
        this.running = done < 1
        this.draw()
        if (begin || done === 1) this.refresh()
    }
}

app.registerExtension({
    name: "SubjectDLA.Stages",
    setup() {
        const style = document.createElement("style")
        style.textContent = STYLE
        document.head.append(style)
        api.addEventListener("subject_dla.run", ({ detail }) => editors.forEach((editor) => editor.follow(detail)))
        for (const name of ["execution_interrupted", "execution_error", "execution_success"])
            api.addEventListener(name, () => editors.forEach((editor) => editor.end()))
        // values and links change in many ways, without an event that all front ends have
        setInterval(() => {
            if (document.hidden) return
            for (const editor of editors) if (editor.isAlive()) editor.refresh()
                else editors.delete(editor)
        }, 300)
    },
    nodeCreated(node) {
        if (!KINDS.includes(node.comfyClass ?? node.type)) return
        editors.add(new StageEditor(node))
        // room for all of it, which a node of an older file may not have: there it takes less, above the nodes below
        node.setSize([Math.max(node.size[0], 380), node.computeSize()[1] + 110])
    },
})
