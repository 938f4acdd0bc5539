// The graph around the stage editor: what of it the server is asked, and how values and keyframes are changed.
import { app } from "../../../scripts/app.js"

export const KINDS = ["SubjectApplyStages", "SubjectStageSchedule"]
export const KEYFRAME = "SubjectStageKeyframe"
export const SCHEDULE_WIDGETS = ["preset", "clock", "tau1", "tau2"]

/**
 * The node's graph as it is queued, as far as the server asks: typed values and links. Muted and bypassed nodes are left
 * out, and links from outside of a subgraph, in which the values typed there are shown.
 */
export function graphOf(graph) {
    const found = {}
    for (const node of graph._nodes ?? graph.nodes) {
        if (isMuted(node) || isPassed(node)) continue
        const inputs = {}
        for (const widget of node.widgets ?? [])
            if (["number", "string", "boolean"].includes(typeof widget.value)) inputs[widget.name] = widget.value
        if (node.type === "PrimitiveNode") inputs.value = node.widgets?.[0]?.value // whose widget has its target's name
        for (const input of node.inputs ?? []) {
            const source = sourceOf(graph, input.link)
            if (source) inputs[input.name] = source
        }
        found[String(node.id)] = { class_type: node.type, inputs }
    }
    return found
}

const isMuted = (node) => node.mode === 2
const isPassed = (node) => node.mode === 4 || node.type === "Reroute" // bypassed, or of the front end alone

/** Node and output that a link comes from. A bypassed node passes on an input of the output's type, a muted one none. */
function sourceOf(graph, id) {
    const link = id == null ? null : linkOf(graph, id)
    const node = nodeOf(graph, link?.origin_id)
    if (!node || isMuted(node)) return null
    if (!isPassed(node)) return [String(node.id), link.origin_slot]
    const { type } = node.outputs[link.origin_slot]
    const inputs = [node.inputs[link.origin_slot], ...node.inputs]
    const passed = inputs.find((one) => one && (one.type === type || node.type === "Reroute"))
    return passed ? sourceOf(graph, passed.link) : null
}

const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links.get?.(id) ?? graph.links[id]
export const nodeOf = (graph, id) => (id == null ? null : graph.getNodeById(id) ?? graph.getNodeById(Number(id)))
export const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name)

/** The last keyframe of the chain that begins with a Stage Schedule; any other node itself. */
export function lastOf(node, last = node) {
    for (const { links } of node.type === KINDS[0] ? [] : node.outputs)
        for (const { target_id, target_slot } of (links ?? []).map((id) => linkOf(node.graph, id))) {
            const next = nodeOf(node.graph, target_id)
            if (next?.type === KEYFRAME && !isMuted(next) && next.inputs[target_slot]?.name === "previous")
                return lastOf(next, isPassed(next) ? last : next)
        }
    return last
}

/** Why a run has nothing of the node; "" for one that runs. */
export function unused(node) {
    if (isMuted(node)) return "Muted: this node does not run."
    return isPassed(node) ? "Bypassed: a run goes past this node." : ""
}

/** One change for the front end's undo, whatever it consists of. */
export function change(act) {
    app.canvas.emitBeforeChange()
    try {
        return act()
    } finally {
        app.canvas.graph.updateExecutionOrder() // connecting does not: after undo it would be a change, and redo end
        app.canvas.emitAfterChange()
    }
}

/** Sets a widget as a person would: the value, then what listens to it. */
export function setValue(node, name, value) {
    const widget = widgetOf(node, name)
    if (!widget || widget.value === value) return
    widget.value = value
    widget.callback?.(value, app.canvas, node)
    node.setDirtyCanvas(true, true)
}

/** A Stage Keyframe behind the schedule, from the middle of its last stage on, so far with the same strengths. */
export function addKeyframe(graph, { keyframes, clock }) {
    const last = keyframes.at(-1)
    let source = nodeOf(graph, last.node)
    if (source.type === KINDS[0]) source = schedule(source)
    const output = source.outputs.findIndex((one) => one.type === "STAGES")
    const targets = (source.outputs[output].links ?? []).map((id) => linkOf(graph, id))
    const key = LiteGraph.createNode(KEYFRAME)
    key.pos = [source.pos[0] + source.size[0] + 40, source.pos[1]]
    graph.add(key)
    const from = keyframes.length > 1 ? last.start : clock.start
    setValue(key, "start", Math.round(((from + clock.end) / 2) * 100) / 100)
    setValue(key, "mllm_strength", last.mllm)
    setValue(key, "vae_strength", last.vae)
    setValue(key, "clock", clock.name)
    const out = key.outputs.findIndex((one) => one.type === "STAGES")
    for (const link of targets) key.connect(out, nodeOf(graph, link.target_id), link.target_slot)
    source.connect(output, key, key.inputs.findIndex((one) => one.name === "previous"))
}

/** A Stage Schedule with the values of an Apply Stages, connected to it. */
function schedule(node) {
    const made = LiteGraph.createNode(KINDS[1])
    made.pos = [node.pos[0], node.pos[1] + node.size[1] + 60]
    node.graph.add(made)
    for (const name of SCHEDULE_WIDGETS) setValue(made, name, widgetOf(node, name).value)
    made.connect(0, node, node.inputs.findIndex((one) => one.name === "stages"))
    return made
}

/** Removes a Stage Keyframe; what read it reads the schedule before it. */
export function removeKeyframe(key) {
    const { graph } = key
    const previous = key.inputs.find((one) => one.name === "previous")
    const link = previous.link == null ? null : linkOf(graph, previous.link)
    const targets = key.outputs.flatMap((one) => (one.links ?? []).map((id) => linkOf(graph, id)))
    for (const { target_id, target_slot } of link ? targets : [])
        nodeOf(graph, link.origin_id).connect(link.origin_slot, nodeOf(graph, target_id), target_slot)
    graph.remove(key)
}
