"""Small workflows as the editor saves them, one for each thing that it leaves out, passes through or expands."""

from copy import deepcopy

LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
MODEL, CLIP, VAE, CONDITION, LATENT, IMAGE = "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE"
STATE = {"lastGroupId": 0, "lastNodeId": 99, "lastLinkId": 99, "lastRerouteId": 0}
BYPASSED, MUTED = {"mode": 4}, {"mode": 2}


def node(kind, links=None, values=(), **more):
    """A node; `links`: input -> (id of the node that feeds it, its output, type), and "widget" if it is a widget's."""
    return {"type": kind, "from": links or {}, "widgets_values": list(values), **more}


def draw(nodes):
    """(nodes, links) as a file has them, links as lists."""
    links = [
        [origin, slot, key, index, kind]
        for key, given in nodes.items()
        for index, (origin, slot, kind, *_) in enumerate(given["from"].values())
    ]
    links = [[number, *link] for number, link in enumerate(links, 1)]
    found = []
    for key, given in nodes.items():
        feeding = iter(link[0] for link in links if link[3] == key)
        inputs = [
            {"name": name, "type": kind, "link": next(feeding)} | ({"widget": {"name": name}} if widget else {})
            for name, (_, _, kind, *widget) in given["from"].items()
        ]
        made = {link[2]: link[5] for link in links if link[1] == key}
        outputs = [
            {"name": str(slot), "type": made.get(slot, "*"), "links": [k[0] for k in links if k[1:3] == [key, slot]]}
            for slot in range(1 + max(made, default=-1))
        ]
        saved = {"id": key, "pos": [0, 0], "size": [200, 100], "flags": {}, "order": 0, "mode": 0, "properties": {}}
        found.append(saved | {"inputs": inputs, "outputs": outputs, **given})
    return found, links


def workflow(nodes, subgraphs=()):
    found, links = draw(nodes)
    saved = {"id": "a1b2c3d4-0000-4000-8000-000000000000", "revision": 0, "nodes": found, "links": links, "groups": []}
    saved |= {"last_node_id": 99, "last_link_id": 99, "config": {}, "extra": {}, "version": 0.4}
    return saved | ({"definitions": {"subgraphs": list(subgraphs)}} if subgraphs else {})


def subgraph(key, nodes, inputs, outputs):
    """A definition; `inputs`: name -> type, which nodes inside link to as node -10; `outputs`: as a node's links."""
    found, links = draw(nodes | {-20: node("outputs", outputs)})
    ends = {"id": -10, "bounding": [0, 0, 9, 9]}, {"id": -20, "bounding": [0, 0, 9, 9]}
    return {
        "id": key, "name": "inside", "version": 1, "revision": 0, "config": {}, "groups": [], "extra": {},
        "widgets": [], "state": STATE,
        "inputNode": ends[0], "outputNode": ends[1], "nodes": found[:-1],
        "links": [dict(zip(LINK, link)) for link in links],
        "inputs": [{"id": f"{key}-{name}", "name": name, "type": kind,
                    "linkIds": [link[0] for link in links if link[1:3] == [-10, index]]}
                   for index, (name, kind) in enumerate(inputs.items())],
        "outputs": [{"id": f"{key}-{name}", "name": name, "type": source[2],
                     "linkIds": [link[0] for link in links if link[3:5] == [-20, index]]}
                    for index, (name, source) in enumerate(outputs.items())],
    }  # fmt: skip


STOCK = {  # text to image
    1: node("CheckpointLoaderSimple", values=["a.safetensors"]),
    2: node("CLIPTextEncode", {"clip": (1, 1, CLIP)}, ["words"], title="Positive"),
    3: node("CLIPTextEncode", {"clip": (1, 1, CLIP)}, ["ugly"]),
    4: node("EmptyLatentImage", values=[64, 32, 1]),
    5: node("KSampler", {"model": (1, 0, MODEL), "positive": (2, 0, CONDITION), "negative": (3, 0, CONDITION),
                         "latent_image": (4, 0, LATENT)}, [7, "randomize", 4, 1.5, "euler", "simple", 1.0]),
    6: node("VAEDecode", {"samples": (5, 0, LATENT), "vae": (1, 2, VAE)}),
    7: node("SaveImage", {"images": (6, 0, IMAGE)}, ["x"]),
}  # fmt: skip


def stock(changes=None, **more):
    """The stock nodes with others in their place or besides, and further links for those named ("_5")."""
    nodes = deepcopy(STOCK) | (changes or {})
    for key, links in more.items():
        nodes[int(key.strip("_"))]["from"] |= links
    return nodes


def controlled(kind="ControlNetApplyAdvanced", **more):
    """The stock graph with a ControlNet between the conditions and the sampler."""
    links = {"positive": (2, 0, CONDITION), "negative": (3, 0, CONDITION), "control_net": (10, 0, "CONTROL_NET")}
    control = node(kind, links | {"image": (11, 0, IMAGE)}, [0.5, 0.0, 1.0], **more)
    files = {10: node("ControlNetLoader", values=["c.safetensors"]), 11: node("LoadImage", values=["a.png", "image"])}
    return stock(files | {12: control}, _5={"positive": (12, 0, CONDITION), "negative": (12, 1, CONDITION)})


PAIR, NESTED = "a1b2c3d4-0000-4000-8000-000000000001", "a1b2c3d4-0000-4000-8000-000000000002"
ENCODED = subgraph(  # two texts to two conditions; the first text's widget is the subgraph's own input
    PAIR,
    {
        21: node("CLIPTextEncode", {"clip": (-10, 0, CLIP), "text": (-10, 1, "STRING", "widget")}, ["inner words"]),
        20: node("CLIPTextEncode", {"clip": (-10, 0, CLIP)}, ["inner ugly"]),
    },
    {"clip": CLIP, "words": "STRING"},
    {"positive": (21, 0, CONDITION), "negative": (20, 0, CONDITION)},
)
OUTER = subgraph(  # the same in a subgraph of its own
    NESTED,
    {30: node(PAIR, {"clip": (-10, 0, CLIP), "words": (-10, 1, "STRING", "widget")}, ["middle words"])},
    {"clip": CLIP, "words": "STRING"},
    {"positive": (30, 0, CONDITION), "negative": (30, 1, CONDITION)},
)
SECOND = {"model": (-10, 0, MODEL), "positive": (-10, 1, CONDITION), "negative": (-10, 2, CONDITION)}
AGAIN = subgraph(  # a second pass of the sampler
    PAIR,
    {
        21: node("KSampler", SECOND | {"latent_image": (-10, 3, LATENT)}, [8, "fixed", 2, 1, "euler", "simple", 0.5]),
        20: node("PreviewLatentOfAnotherPack", {"latent": (21, 0, LATENT)}, **MUTED),
    },
    {"model": MODEL, "positive": CONDITION, "negative": CONDITION, "latent": LATENT},
    {"latent": (21, 0, LATENT)},
)


def encoded(kind, values=(), **more):
    """The stock graph with both texts in a subgraph."""
    sampler = {"positive": (10, 0, CONDITION), "negative": (10, 1, CONDITION)}
    nodes = stock({10: node(kind, {"clip": (1, 1, CLIP)}, values, **more)}, _5=sampler)
    del nodes[2], nodes[3]
    return nodes


def twice(**more):
    """The stock graph with a second pass in a subgraph."""
    links = {"model": (1, 0, MODEL), "positive": (2, 0, CONDITION), "negative": (3, 0, CONDITION)}
    return stock({10: node(PAIR, links | {"latent": (5, 0, LATENT)}, **more)}, _6={"samples": (10, 0, LATENT)})


REROUTES = {10: node("Reroute", {"": (1, 0, MODEL)}), 11: node("Reroute", {"": (10, 0, "*")})}
LORA = node("LoraLoader", {"model": (1, 0, MODEL), "clip": (1, 1, CLIP)}, ["l.safetensors", 1.0, 1.0], **BYPASSED)
BEHIND = {10: LORA, 11: node("Reroute", {"": (10, 1, CLIP)})}
NUMBERS = {10: node("PrimitiveNode", values=[5, "increment"]), 11: node("PrimitiveNode", values=[48, "fixed"])}
SIZE = (11, 0, "INT", "widget")
SHOWN = {"proxyWidgets": [["20", "text"], ["-1", "words"]]}
ELSEWHERE = "ControlOfAnotherPack"
AS_OBJECTS = {"version": 1, "links": [dict(zip(LINK, link)) for link in workflow(STOCK)["links"]]}
GRAPHS = {
    "stock": workflow(stock()),
    "links as objects": workflow(stock()) | AS_OBJECTS | {"state": STATE},
    "for the editor": workflow(stock({10: node("Note", values=["a"]), 11: node("MarkdownNote", values=["b"])})),
    "bypassed": workflow(controlled(**BYPASSED)),
    "bypassed, of another pack": workflow(controlled(ELSEWHERE, **BYPASSED)),
    "muted": workflow(controlled(**MUTED)),
    "muted, of another pack": workflow(controlled(ELSEWHERE, **MUTED)),
    "reroutes": workflow(stock(REROUTES, _5={"model": (11, 0, MODEL)})),
    "bypassed behind a reroute": workflow(stock(BEHIND, _2={"clip": (11, 0, CLIP)}, _5={"model": (10, 0, MODEL)})),
    "primitive": workflow(stock(NUMBERS, _5={"seed": (10, 0, "INT", "widget")}, _4={"width": SIZE, "height": SIZE})),
    "subgraph": workflow(encoded(PAIR), [ENCODED]),
    "subgraph with a text": workflow(encoded(PAIR, ["outer words"]), [ENCODED]),
    "subgraph with a text inside": workflow(encoded(PAIR, ["outer ugly", "outer words"], properties=SHOWN), [ENCODED]),
    "nested": workflow(encoded(NESTED), [ENCODED, OUTER]),
    "nested with a text": workflow(encoded(NESTED, ["outer words"]), [ENCODED, OUTER]),
    "subgraph of a latent": workflow(twice(), [AGAIN]),
    "subgraph bypassed": workflow(twice(**BYPASSED), [AGAIN]),
    "subgraph muted": workflow(twice(**MUTED), [AGAIN]),
}
# Of these the front end makes something else up to some version after 1.32: it runs what is in a muted subgraph, as
# it mutes all of it when a user mutes it, and a widget inside has one value for all nodes of the subgraph.
NOT_BEFORE_1_49 = ("subgraph muted", "subgraph with a text inside")
