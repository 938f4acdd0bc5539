// How the stage editor draws a schedule: a lane for each strength over the run, and the shapes that are dragged.
const MARGIN = { left: 40, right: 14, top: 10, bottom: 36, between: 12 } // of the lanes, one a strength, in pixels
export const NAMES = { mllm: "MLLM tokens", vae: "VAE tokens" }
export const STYLE = `
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
.subject-stages .hit { fill: transparent; } .subject-stages .handle:not(.up) :not(.hit) { pointer-events: none; }
.subject-stages .handle.up .grip { fill: var(--lane); stroke: currentColor; }
.subject-stages .handle:focus-visible .grip { stroke: currentColor; stroke-width: 3; }
.subject-stages .now { stroke: currentColor; stroke-width: 2; }
.subject-stages .row { display: flex; gap: 6px; align-items: center; }
.subject-stages button { font: inherit; color: inherit; background: var(--comfy-input-bg, #222); cursor: pointer;
    border: 1px solid var(--border-color, #888); border-radius: 4px; padding: 0 6px; }
.subject-stages button:disabled { opacity: 0.4; cursor: default; }
.subject-stages output { flex: 0 1 7.2em; white-space: pre-line; min-height: 0; overflow: auto; font-size: 10px;
    line-height: 1.2em; scrollbar-width: thin; }
.subject-stages output.wrong { color: var(--error-text, #ff4444); }`

export function element(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name)
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
    made.append(...children)
    return made
}

export class Drawing {
    /** Of a plan of the server, at the size that the SVG has in the layout, whatever the zoom of the canvas. */
    constructor(plan, svg) {
        this.plan = plan
        this.svg = svg
        this.width = svg.clientWidth
        this.height = svg.clientHeight
        this.most = Math.max(1, ...plan.keyframes.flatMap((key) => [key.mllm, key.vae]))
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

    /** The position on the clock where the pointer is; with the name of a lane, the strength there. */
    valueAt(event, lane) {
        const box = this.svg.getBoundingClientRect() // of the page, whatever the zoom
        const x = ((event.clientX - box.left) / box.width) * this.width
        const y = ((event.clientY - box.top) / box.height) * this.height
        if (lane) return ((this.lane(lane)[1] - y) / this.lane(lane)[0]) * this.most
        const { start, end } = this.plan.clock
        return start + ((x - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right)) * (end - start)
    }

    /** Lanes, axis and steps, and where the step `now` is that runs. */
    lanes(now) {
        const { plan } = this
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
        if (now !== null) line("now", this.x(now), MARGIN.top, this.x(now), bottom)
        return parts
    }

    /** The bar at a keyframe's start. It is hit beside it too, but never beyond the middle to a neighbour's. */
    bar(index) {
        const places = this.plan.keyframes.map((key) => this.x(key.start))
        const x = places[index]
        const left = Math.max(x - 6, index > 1 ? (places[index - 1] + x) / 2 : 0)
        const right = Math.min(x + 6, ((places[index + 1] ?? Infinity) + x) / 2)
        const [top, bottom] = [MARGIN.top, this.lane("vae")[1]]
        return [
            element("line", { class: "axis", x1: x, x2: x, y1: top, y2: bottom }),
            element("rect", { class: "grip", x: x - 4, y: this.lane("mllm")[1] - 2, width: 8, height: 16, rx: 3 }),
            element("rect", { class: "hit", x: left, width: right - left, y: top, height: bottom - top }),
        ]
    }

    /** The dot at one of a keyframe's strengths. */
    dot(key, index, name) {
        return [element("circle", { class: "grip", cx: index ? this.x(key.start) : MARGIN.left, cy: this.y(name, key[name]), r: 5 })]
    }
}
