import { app } from "../../../scripts/app.js"

// Hosts without search aliases (before 0.11) search the names of nodes alone, and of these about the first 30 letters.
// There the search offers a node also by names with other words; what is added is the node itself.
const WORDS = { SubjectAddIdentity: ["IPAdapter, PuLID", "Kontext, multi subject", "consistent character"] }

const names = (def) => (def.search_aliases ? [] : (WORDS[def.name] ?? [])).map((words) => [`${def.name}: ${words}`, words])

app.registerExtension({
  name: "SubjectDLA.SearchWords",
  beforeRegisterNodeDef(nodeType, nodeData) {
    for (const [name] of names(nodeData)) {
      const kind = class extends nodeType {
        onNodeCreated() {
          this.type = nodeData.name // as it is saved
          this.title = nodeType.title
          return super.onNodeCreated?.()
        }
      }
      kind.skip_list = true // not in the canvas's menu of nodes
      LiteGraph.registerNodeType(name, kind)
    }
  },
  beforeRegisterVueAppNodeDefs(defs) {
    for (const def of [...defs])
      for (const [name, words] of names(def))
        defs.push({ ...def, name, display_name: `${def.display_name.split(" (")[0]} (${words})` })
  },
})
