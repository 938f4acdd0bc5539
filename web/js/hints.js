// What a node hints while it runs, as a message of the editor too: newer front ends take the text off the node when the
// run ends, and Nodes 2.0 of 1.32 does not draw it (nodes/hints.py).
import { api } from "../../../scripts/api.js"
import { app } from "../../../scripts/app.js"

app.registerExtension({
    name: "SubjectDLA.Hints",
    setup() {
        api.addEventListener("subject_dla.hint", ({ detail: { title, text } }) =>
            app.extensionManager.toast.add({ severity: "warn", summary: title, detail: text, life: 20_000 }))
    },
})
