// Colours of the pack's sockets and their links. Searched so that the five differ from each other and from MODEL, CLIP,
// VAE and IMAGE of the host's palettes, also for people with protanopia, deuteranopia and tritanopia, and stand out
// from the nodes' ground.
import { app } from "../../../scripts/app.js"

const COLOURS = {
    // type: [dark palettes, light palettes]
    MLLM: ["#d8f078", "#484800"],
    MLLM_FEATURES: ["#a8f0c0", "#004830"],
    DLA: ["#f03000", "#903078"],
    STAGES: ["#6060d8", "#0048f0"],
    ORIENTATION_MODEL: ["#906078", "#a87878"],
}

/** Whether the palette is a dark one, by the ground of its nodes: front ends mark it on the page in different ways. */
function isDark() {
    const found = /^#(..)(..)(..)/.exec(LiteGraph.NODE_DEFAULT_BGCOLOR)
    if (!found) return true
    const [red, green, blue] = found.slice(1).map((part) => parseInt(part, 16))
    return 0.3 * red + 0.6 * green + 0.1 * blue < 128
}

const colourOf = (type) => COLOURS[type][isDark() ? 0 : 1]

/** A property that is ours wherever the palette does not name it: palettes assign "" to types that they do not know. */
function fallBack(colours, type, onPalette = () => {}) {
    let named = colours[type]
    Object.defineProperty(colours, type, {
        configurable: true,
        enumerable: true,
        get: () => named || colourOf(type),
        set: (value) => {
            named = value
            onPalette()
        },
    })
}

app.registerExtension({
    name: "SubjectDLA.Colours",
    setup() {
        // Nodes 2.0 reads CSS variables, which a palette that names a type sets inline, above any style sheet.
        const style = document.createElement("style")
        const write = () => {
            const variables = Object.keys(COLOURS).map((type) => `--color-datatype-${type}: ${colourOf(type)};`)
            style.textContent = `:root { ${variables.join(" ")} }`
        }
        write()
        document.head.append(style)
        for (const type of Object.keys(COLOURS)) {
            fallBack(app.canvas.constructor.link_type_colors, type)
            // later, since a palette names the ground of nodes after the colours of links
            fallBack(app.canvas.default_connection_color_byType, type, () => setTimeout(write))
        }
        app.canvas.setDirty(true, true)
    },
})
