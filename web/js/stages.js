// The stage editor of Apply Stages and Stage Schedule: the two strengths over the run, drawn by the server's own code
// (sampling/stage_editor.py). It holds no value: dragging sets the widgets of the nodes, which the queue and files read.
import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"

const KINDS = ["SubjectApplyStages", "SubjectStageSchedule"]
const KEYFRAME = "SubjectStageKeyframe"
const MARGIN = { left: 40, right: 14, top: 10, bottom: 36, between: 12 } // of the lanes, one a strength, in pixels
const STEP = 0.01 // of a widget; ten times with Shift
const NAMES = { mllm: "MLLM tokens", vae: "VAE tokens" }
const STYLE = `
.subject-stages { display: flex; flex-direction: column; gap: 4px; font: 11px sans-serif; min-width: 0;
    min-height: 130px; color: var(--input-text, #ddd); --mllm: #3b8de0; --vae: #e07f14; }
.subject-stages svg { width: 100%; flex: 1 1 130px; min-height: 90px; touch-action: none;
    background: var(--comfy-input-bg, #222); border-radius: 4px; overflow: hidden; }
.subject-stages text { fill: currentColor; font-size: 10px; user-select: none; }
.subject-stages .axis, .subject-stages .tick { stroke: currentColor; opacity: 0.35; }
.subject-stages path { fill: var(--lane); fill-opacity: 0.3; stroke: var(--lane); stroke-width: 2; }
.subject-stages .mllm { --lane: var(--mllm); } .subject-stages .vae { --lane: var(--vae); }
.subject-stages .handle { cursor: ew-resize; outline: none; } .subject-stages .handle.up { cursor: ns-resize; }
.subject-stages .handle .grip { fill: currentColor; stroke: var(--comfy-input-bg, #222); }
.subject-stages .handle.up .grip { fill: var(--lane); stroke: currentColor; }
.subject-stages .handle:focus-visible .grip { stroke: currentColor; stroke-width: 3; }
.subject-stages .now { stroke: currentColor; stroke-width: 2; }
.subject-stages .row { display: flex; gap: 6px; align-items: center; }
.subject-stages button { font: inherit; color: inherit; background: var(--comfy-input-bg, #222); cursor: pointer;
    border: 1px solid var(--border-color, #888); border-radius: 4px; padding: 0 6px; }
.subject-stages button:disabled { opacity: 0.4; cursor: default; }
.subject-stages output { flex: 0 1 3.6em; white-space: pre-line; min-height: 0; overflow: auto; line-height: 1.2em; }
.subject-stages output.wrong { color: var(--error-text, #ff4444); }`

const editors = new Set()
const lastRuns = new Map() // what the last run of a node said; undo makes all nodes anew

function element(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name)
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
    made.append(...children)
    return made
}

/**
 * The node's graph in the API's form, as far as the server asks: typed values and links; muted nodes are left out, and
 * links from outside of a subgraph, in which the values typed there are shown.
 */
function graphOf(graph) {
    const found = {}
    for (const node of graph._nodes ?? graph.nodes) {
        if (node.mode === 2) continue
        const inputs = {}
        for (const widget of node.mode === 4 ? [] : node.widgets ?? [])
            if (["number", "string", "boolean"].includes(typeof widget.value)) inputs[widget.name] = widget.value
        for (const input of node.inputs ?? []) {
            const link = input.link == null ? null : linkOf(graph, input.link)
            if (nodeOf(graph, link?.origin_id)) inputs[input.name] = [String(link.origin_id), link.origin_slot]
        }
        found[String(node.id)] = { class_type: node.mode === 4 ? "bypassed" : node.type, inputs }
    }
    return found
}

const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links.get?.(id) ?? graph.links[id]
const nodeOf = (graph, id) => (id == null ? null : graph.getNodeById(id) ?? graph.getNodeById(Number(id)))
const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)

/** The last keyframe of the chain that begins with a Stage Schedule; any other node itself. */
function lastOf(node) {
    for (const { links } of node.type === KINDS[0] ? [] : node.outputs)
        for (const { target_id, target_slot } of (links ?? []).map((id) => linkOf(node.graph, id))) {
            const next = nodeOf(node.graph, target_id)
            if (next?.type === KEYFRAME && next.inputs[target_slot]?.name === "previous") return lastOf(next)
        }
    return node
}

/** One change for the front end's undo, whatever it consists of. */
function change(act) {
    app.canvas.emitBeforeChange()
    try {
        return act()
    } finally {
        app.canvas.emitAfterChange()
    }
}

/** Sets a widget as a person would: the value, then what listens to it. */
function setValue(node, name, value) {
    const widget = widgetOf(node, name)
    if (!widget || widget.value === value) return
    widget.value = value
    widget.callback?.(value, app.canvas, node)
    node.setDirtyCanvas(true, true)
}

class StageEditor {
    constructor(node) {
        this.node = node
        this.now = null // position of the step that runs
        this.plan = null
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
        })
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
            if (response.ok) this.plan = answer
            this.wrong = response.ok ? "" : answer.error
        } catch {
            this.wrong = "The server does not answer."
            this.asked = null
        }
        this.asking = false
        this.draw()
    }

    x(position) {
        const { start, end } = this.plan.clock
        return MARGIN.left + ((position - start) / (end - start)) * (this.width - MARGIN.left - MARGIN.right)
    }

    /** Height of a lane, and where its floor is. */
    lane(name) {
        const height = (this.height - MARGIN.top - MARGIN.bottom - MARGIN.between) / 2
        return [height, MARGIN.top + height + (name === "vae" ? height + MARGIN.between : 0)]
    }

    y(name, strength) {
        const [height, floor] = this.lane(name)
        return floor - (strength / this.most) * height
    }

    draw() {
        const { plan } = this
        this.say(this.wrong || this.live || this.summary(), Boolean(this.wrong))
        if (!plan || !this.node.graph) return
        this.grey()
        if (!this.svg.clientWidth) return
        this.width = this.svg.clientWidth // of the layout, whatever the zoom of the canvas
        this.height = this.svg.clientHeight
        const focused = this.svg.contains(document.activeElement) ? document.activeElement.dataset.handle : null
        this.most = Math.max(1, ...plan.keyframes.flatMap((key) => [key.mllm, key.vae]))
        this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`)
        this.svg.setAttribute("aria-label", `Stage schedule. ${plan.text}`)
        const [, bottom] = this.lane("vae")
        const parts = []
        const line = (className, x, y, x2, y2, more = {}) =>
            parts.push(element("line", { class: className, x1: x, y1: y, x2, y2, ...more }))
        const text = (x, y, content, anchor) =>
            parts.push(element("text", { x, y, "text-anchor": anchor }, content))
        for (const [index, name] of Object.keys(NAMES).entries()) {
            const floor = this.y(name, 0)
            const points = plan.curve.map((point) => `${this.x(point[0])} ${this.y(name, point[index + 1])}`).join(" L ")
            const ends = [plan.clock.end, plan.clock.start].map((position) => `${this.x(position)} ${floor}`).join(" L ")
            parts.push(element("path", { class: name, d: `M ${points} L ${ends} Z` }))
            line("axis", this.x(plan.clock.start), floor, this.x(plan.clock.end), floor)
            text(4, floor - this.lane(name)[0] / 2 + 4, NAMES[name].split(" ")[0], "start")
            for (const value of this.most > 1 ? [0, 1, this.most] : [0, 1])
                text(MARGIN.left - 4, this.y(name, value) + 3, String(value), "end")
        }
        for (const position of [0, 0.25, 0.5, 0.75, 1])
            text(this.x(position), bottom + 19, String(position), "middle")
        text(MARGIN.left, bottom + 32, [plan.clock.name, plan.run?.text].filter(Boolean).join(", "), "start")
        for (const [position] of plan.steps) line("tick", this.x(position), bottom, this.x(position), bottom + 7)
        if (this.now !== null) line("now", this.x(this.now), MARGIN.top, this.x(this.now), bottom)
        plan.keyframes.forEach((key, index) => parts.push(...this.handles(key, index)))
        this.svg.replaceChildren(...parts)
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

    /** What is not read is greyed out: thresholds of the preset, or all where a schedule is connected. */
    grey() {
        for (const [id, reads] of Object.entries(this.plan.reads)) {
            const node = nodeOf(this.node.graph, id)
            for (const name of ["preset", "clock", "tau1", "tau2"]) {
                const widget = widgetOf(node, name)
                if (!widget || !!widget.disabled === !reads.includes(name)) continue
                widget.disabled = !reads.includes(name)
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
        const title = `${owner?.title ?? ""}, keyframe ${index + 1}`
        const x = index ? this.x(key.start) : MARGIN.left
        if (key.start_input && index > 0) {
            const ends = { x1: x, x2: x, y1: MARGIN.top, y2: this.lane("vae")[1] }
            const parts = [
                element("line", { class: "axis", ...ends }),
                element("line", { stroke: "transparent", "stroke-width": 12, ...ends }), // easier to hit
                element("rect", { class: "grip", x: x - 4, y: this.lane("mllm")[1] - 2, width: 8, height: 16, rx: 3 }),
            ]
            found.push(this.handle(owner, key.start_input, `${title}, start`, key.start, this.limits(index), "", parts))
        }
        for (const name of Object.keys(NAMES)) {
            const parts = [element("circle", { class: "grip", cx: x, cy: this.y(name, key[name]), r: 5 })]
            if (key[`${name}_input`])
                found.push(this.handle(owner, key[`${name}_input`], `${title}, ${NAMES[name]}`, key[name], [0, 2], name, parts))
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
            const move = (moved) => set(this.valueAt(moved, lane))
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

    valueAt(event, lane) {
        const box = this.svg.getBoundingClientRect() // of the page, whatever the zoom
        const x = ((event.clientX - box.left) / box.width) * this.width
        const y = ((event.clientY - box.top) / box.height) * this.height
        if (lane) return ((this.lane(lane)[1] - y) / this.lane(lane)[0]) * this.most
        const { start, end } = this.plan.clock
        return start + ((x - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right)) * (end - start)
    }

    /** A Stage Keyframe behind the schedule, from the middle of its last stage on, so far with the same strengths. */
    addKeyframe() {
        const { graph } = this.node
        const last = this.plan?.keyframes.at(-1)
        if (!last) return
        change(() => {
            let source = this.lastNode()
            if (source.type === KINDS[0]) source = this.schedule(source)
            const output = source.outputs.findIndex((one) => one.type === "STAGES")
            const targets = (source.outputs[output].links ?? []).map((id) => linkOf(graph, id))
            const key = LiteGraph.createNode(KEYFRAME)
            key.pos = [source.pos[0] + source.size[0] + 40, source.pos[1]]
            graph.add(key)
            const from = this.plan.keyframes.length > 1 ? last.start : this.plan.clock.start
            setValue(key, "start", Math.round(((from + this.plan.clock.end) / 2) * 100) / 100)
            setValue(key, "mllm_strength", last.mllm)
            setValue(key, "vae_strength", last.vae)
            setValue(key, "clock", this.plan.clock.name)
            const out = key.outputs.findIndex((one) => one.type === "STAGES")
            for (const link of targets) key.connect(out, nodeOf(graph, link.target_id), link.target_slot)
            source.connect(output, key, key.inputs.findIndex((one) => one.name === "previous"))
        })
        this.refresh()
    }

    /** A Stage Schedule with the values of an Apply Stages, connected to it. */
    schedule(node) {
        const made = LiteGraph.createNode(KINDS[1])
        made.pos = [node.pos[0], node.pos[1] + node.size[1] + 60]
        node.graph.add(made)
        for (const name of ["preset", "clock", "tau1", "tau2"]) setValue(made, name, widgetOf(node, name).value)
        made.connect(0, node, node.inputs.findIndex((one) => one.name === "stages"))
        return made
    }

    removeKeyframe(key) {
        const { graph } = this.node
        if (key?.type !== KEYFRAME) return
        change(() => {
            const previous = key.inputs.find((one) => one.name === "previous")
            const link = previous.link == null ? null : linkOf(graph, previous.link)
            const targets = key.outputs.flatMap((one) => (one.links ?? []).map((id) => linkOf(graph, id)))
            for (const { target_id, target_slot } of link ? targets : [])
                nodeOf(graph, link.origin_id).connect(link.origin_slot, nodeOf(graph, target_id), target_slot)
            graph.remove(key)
        })
        this.refresh()
    }

    /** After a run that was stopped. */
    end() {
        this.now = null
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
        for (const name of ["execution_interrupted", "execution_error"])
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
