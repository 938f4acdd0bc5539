"""Draws the demo's toys with panda3d's software renderer, and the place behind them.

Every toy is made of prisms (a wooden pull-toy): a profile in the plane of length and height, pushed out along the width.
The toy faces -y, x is its width, z up, in units of half its length.
"""

from __future__ import annotations

from functools import cache
from math import cos, pi, radians, sin

import numpy as np
from panda3d.core import (
    AmbientLight,
    CardMaker,
    DirectionalLight,
    FrameBufferProperties,
    Geom,
    GeomNode,
    GeomTriangles,
    GeomVertexData,
    GeomVertexFormat,
    GeomVertexWriter,
    GraphicsPipe,
    NodePath,
    PerspectiveLens,
    Point3,
    SamplerState,
    Texture,
    TransparencyAttrib,
    WindowProperties,
    loadPrcFileData,
)
from PIL import Image, ImageDraw

from .layout import SIDE
from .world import COLOURS, Picture, Toy, View

loadPrcFileData("", "load-display p3tinydisplay\nwindow-type offscreen\naudio-library-name null\nframebuffer-alpha 1")
loadPrcFileData("", "notify-level error")

from direct.showbase.ShowBase import ShowBase  # noqa: E402

OVER = 2  # drawn so much larger, then scaled down: the renderer has no antialiasing
BODIES = {  # (profile of (y, z), half the width) of the body and the top
    "car": ([(-1, 0.25), (1, 0.25), (1, 0.95), (-1, 0.85)], 0.5, [(-0.3, 0.9), (0.85, 0.95), (0.6, 1.45), (0, 1.45)], 0.42),
    "truck": ([(-0.2, 0.25), (1, 0.25), (1, 1.45), (-0.2, 1.45)], 0.5, [(-1, 0.25), (-0.25, 0.25), (-0.25, 1.1), (-0.75, 1.1), (-1, 0.7)], 0.45),
    "train": ([(-1, 0.25), (0.3, 0.25), (0.3, 1), (-1, 1)], 0.4, [(0.3, 0.25), (1, 0.25), (1, 1.5), (0.2, 1.5), (0.3, 1.3)], 0.5),
    "boat": ([(-0.85, 0.25), (0.95, 0.25), (1, 0.9), (-1.15, 0.9)], 0.5, [(-0.1, 0.9), (0.7, 0.9), (0.7, 1.45), (0.1, 1.45)], 0.35),
    "duck": ([(-0.75, 0.25), (0.7, 0.25), (1.1, 1.05), (0.6, 0.85), (-0.8, 0.85), (-0.95, 0.5)], 0.42, [(-0.9, 0.85), (-0.3, 0.85), (-0.15, 1.15), (-0.3, 1.5), (-0.8, 1.5), (-0.98, 1.15)], 0.32),
}  # fmt: skip
FLANK = {
    "car": (0, 0.58),
    "truck": (0.4, 0.85),
    "train": (-0.35, 0.62),
    "boat": (0, 0.58),
    "duck": (0, 0.56),
}  # its decal's middle


class Renderer:
    """One window without a screen. Only one may exist in a process."""

    def __init__(self):
        self.base = ShowBase(windowType="none")
        properties = FrameBufferProperties()
        properties.setRgbaBits(8, 8, 8, 8)
        properties.setDepthBits(24)
        self.base.makeDefaultPipe()
        size = WindowProperties.size(SIDE * OVER, SIDE * OVER)
        self.window = self.base.graphicsEngine.makeOutput(
            self.base.pipe, "view", 0, properties, size, GraphicsPipe.BFRefuseWindow
        )
        self.window.setClearColorActive(True)
        self.window.setClearColor((0, 0, 0, 0))
        light = AmbientLight("all round")
        light.setColor((0.62, 0.62, 0.62, 1))
        self.base.render.setLight(self.base.render.attachNewNode(light))
        sun = DirectionalLight("sun")
        sun.setColor((0.5, 0.5, 0.5, 1))
        self.sun = self.base.render.attachNewNode(sun)
        self.base.render.setLight(self.sun)
        self.lens = PerspectiveLens()
        self.lens.setFov(20)
        self.lens.setNearFar(1, 40)
        self.camera = self.base.makeCamera(self.window, lens=self.lens)
        self.camera.reparentTo(self.base.render)

    def toys(self, toys: tuple[Toy, ...], view: View) -> np.ndarray:
        """(SIDE, SIDE, 4) uint8, the toys and their shadows over nothing."""
        root = self.base.render.attachNewNode("toys")
        a, p = radians(view.azimuth), radians(view.polar)
        for index, toy in enumerate(toys):
            node = build(toy)
            node.reparentTo(root)
            if len(toys) > 1:  # side by side as the camera sees them, each in the view
                place = (index - 0.5) * 2.15
                node.setPos(cos(a) * place, sin(a) * place, 0)
        middle = Point3(0, 0, 0.75)
        far = 8.9 if len(toys) == 1 else 15
        self.camera.setPos(middle + Point3(sin(a) * cos(p), -cos(a) * cos(p), sin(p)) * far)
        self.camera.lookAt(middle)
        self.sun.setHpr(self.camera.getH() + 35, -50, 0)
        self.base.graphicsEngine.renderFrame()
        self.base.graphicsEngine.renderFrame()
        data = self.window.getScreenshot()
        pixels = np.frombuffer(data.getRamImageAs("RGBA"), np.uint8).reshape(SIDE * OVER, SIDE * OVER, 4)[::-1]
        root.removeNode()
        return np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels), "RGBA")
            .convert("RGBa")
            .resize((SIDE, SIDE), Image.BOX)
            .convert("RGBA")
        )

    def picture(self, picture: Picture) -> Image.Image:
        behind = Image.fromarray(place(picture.place, picture.view.polar, picture.seed), "RGB").convert("RGBA")
        behind.alpha_composite(Image.fromarray(self.toys(picture.toys, picture.view), "RGBA"))
        return behind.convert("RGB")


def build(toy: Toy) -> NodePath:
    root = NodePath("toy")
    body, half, top, top_half = BODIES[toy.kind]
    prism(root, body, half, COLOURS[toy.body], pattern(toy.pattern))
    prism(root, top, top_half, COLOURS[toy.top])
    wheel = [(0.3 * cos(i * pi / 6), 0.3 * sin(i * pi / 6)) for i in range(12)]
    for y in (-0.6, 0.6):
        for side in (-1, 1):
            prism(root, [(y + a, 0.3 + b) for a, b in wheel], 0.1, COLOURS[toy.wheels], x=side * (half + 0.08))
    front = min(y for y, _ in body + top)
    if toy.kind == "duck":
        prism(root, [(-1.3, 1.08), (-0.95, 1.0), (-0.95, 1.22)], 0.16, (245, 170, 30))
    elif toy.kind == "train":
        prism(root, [(-0.85, 1), (-0.55, 1), (-0.55, 1.45), (-0.85, 1.45)], 0.15, COLOURS[toy.top])
    for x in (-0.3, 0.3):  # lamps, pale in front and red behind
        prism(
            root,
            [(front - 0.05, 0.36), (front + 0.1, 0.36), (front + 0.1, 0.54), (front - 0.05, 0.54)],
            0.09,
            (255, 250, 200),
            x=x,
        )
        prism(root, [(0.95, 0.36), (1.05, 0.36), (1.05, 0.54), (0.95, 0.54)], 0.09, (150, 0, 0), x=x)
    y, z = FLANK[toy.kind]
    size = 0.62
    picture = decal(toy.decal, toy.decal_colour)
    for heading, place in ((-90, (-half - 0.02, y, z)), (90, (half + 0.02, y, z))):
        card(root, picture, size, place, heading)
    back = max(a for a, _ in body) + 0.03 if toy.kind != "train" else 1.03
    card(root, picture, size, (0, back + (0 if toy.kind != "duck" else -0.2), z + 0.1), 180)
    card(root, picture, 0.5, (0, front - 0.06, 0.62 if toy.kind != "duck" else 0.55), 0)
    shadow = CardMaker("shadow")
    shadow.setFrame(-0.75, 0.75, -1.25, 1.25)
    node = root.attachNewNode(shadow.generate())
    node.setP(-90)
    node.setZ(0.0)
    node.setTexture(shade())
    node.setTransparency(TransparencyAttrib.MAlpha)
    node.setLightOff(1)
    node.setBin("background", 0)
    node.setDepthWrite(False)
    return root


def prism(
    root: NodePath, profile: list, half: float, colour: tuple, texture: Texture | None = None, x: float = 0
) -> None:
    """A closed convex or nearly convex profile of (y, z), anticlockwise as seen from +x, pushed from x - half to x + half."""
    data = GeomVertexData("prism", GeomVertexFormat.getV3n3t2(), Geom.UHStatic)
    vertex, normal, uv = (GeomVertexWriter(data, name) for name in ("vertex", "normal", "texcoord"))
    triangles = GeomTriangles(Geom.UHStatic)
    count = 0

    def face(points: list, way: tuple) -> None:
        nonlocal count
        for px, py, pz in points:
            vertex.addData3(px, py, pz)
            normal.addData3(*way)
            uv.addData2(py if abs(way[0]) > 0.5 else px, pz if abs(way[2]) < 0.9 else py)
        for i in range(1, len(points) - 1):
            triangles.addVertices(count, count + i, count + i + 1)
        count += len(points)

    face([(x + half, y, z) for y, z in profile], (1, 0, 0))
    face([(x - half, y, z) for y, z in profile[::-1]], (-1, 0, 0))
    for (y1, z1), (y2, z2) in zip(profile, profile[1:] + profile[:1]):
        length = ((y2 - y1) ** 2 + (z2 - z1) ** 2) ** 0.5
        way = (0, (z2 - z1) / length, -(y2 - y1) / length)
        face([(x - half, y1, z1), (x - half, y2, z2), (x + half, y2, z2), (x + half, y1, z1)], way)
    geom = Geom(data)
    geom.addPrimitive(triangles)
    node = GeomNode("prism")
    node.addGeom(geom)
    path = root.attachNewNode(node)
    path.setTwoSided(True)
    path.setColor(*(c / 255 for c in colour), 1)
    if texture is not None:
        path.setTexture(texture)


def card(root: NodePath, texture: Texture, size: float, place: tuple, heading: float) -> None:
    maker = CardMaker("decal")
    maker.setFrame(-size / 2, size / 2, -size / 2, size / 2)
    node = root.attachNewNode(maker.generate())
    node.setPos(*place)
    node.setH(heading)
    node.setTexture(texture)
    node.setTransparency(TransparencyAttrib.MBinary)
    node.setLightOff(1)


def to_texture(image: Image.Image) -> Texture:
    texture = Texture()
    image = image.convert("RGBA")
    texture.setup2dTexture(*image.size, Texture.TUnsignedByte, Texture.FRgba)
    red, green, blue, alpha = image.transpose(Image.FLIP_TOP_BOTTOM).split()
    texture.setRamImage(Image.merge("RGBA", (blue, green, red, alpha)).tobytes())
    texture.setMagfilter(SamplerState.FTLinear)
    texture.setMinfilter(SamplerState.FTLinear)
    return texture


@cache
def pattern(name: str) -> Texture | None:
    """A grey texture that darkens the body's colour; half a unit repeats."""
    if name == "plain":
        return None
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    draw = ImageDraw.Draw(image)
    for step in range(2):
        if name == "striped":
            draw.rectangle((step * 32, 0, step * 32 + 15, 63), fill=(130, 130, 130, 255))
        else:
            for other in range(2):
                for shift in (0, 16):
                    draw.rectangle(
                        (step * 32 + shift, other * 32 + shift, step * 32 + shift + 15, other * 32 + shift + 15),
                        fill=(130, 130, 130, 255),
                    )
    texture = to_texture(image)
    texture.setWrapU(SamplerState.WMRepeat)
    texture.setWrapV(SamplerState.WMRepeat)
    return texture


@cache
def decal(name: str, colour: str) -> Texture:
    size = 64
    image = Image.new("RGBA", (size, size), (*COLOURS[colour], 0))
    draw, fill = ImageDraw.Draw(image), (*COLOURS[colour], 255)
    if name == "star":
        points = [
            (32 + r * sin(i * pi / 5), 34 - r * cos(i * pi / 5)) for i in range(10) for r in [31 if i % 2 == 0 else 13]
        ]
        draw.polygon(points, fill=fill)
    elif name == "disc":
        draw.ellipse((5, 5, 59, 59), fill=fill)
    elif name == "cross":
        draw.rectangle((22, 2, 42, 62), fill=fill)
        draw.rectangle((2, 22, 62, 42), fill=fill)
    elif name == "ring":
        draw.ellipse((2, 2, 62, 62), fill=fill)
        draw.ellipse((18, 18, 46, 46), fill=(*COLOURS[colour], 0))
    elif name == "triangle":
        draw.polygon([(32, 3), (62, 59), (2, 59)], fill=fill)
    else:
        draw.ellipse((2, 6, 34, 38), fill=fill)
        draw.ellipse((30, 6, 62, 38), fill=fill)
        draw.polygon([(4, 30), (60, 30), (32, 62)], fill=fill)
    return to_texture(image)


@cache
def shade() -> Texture:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    alpha = np.clip(1.25 - (x**4 + y**4) ** 0.5 * 1.3, 0, 0.45) * 255
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 3] = alpha
    return to_texture(Image.fromarray(image, "RGBA"))


GROUNDS = {  # ground, sky
    "on grass": ((110, 175, 80), (175, 215, 245)), "on sand": ((225, 200, 150), (150, 205, 240)),
    "in the snow": ((235, 240, 248), (195, 210, 225)), "on a road": ((95, 95, 100), (170, 190, 200)),
    "at night": ((40, 45, 60), (12, 14, 40)),
}  # fmt: skip


def place(name: str, polar: float, seed: int) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: the ground up to a horizon that sinks with the camera, and what is behind."""
    draw = np.random.default_rng(seed)
    ground, sky = GROUNDS.get(name) or (COLOURS[name.split()[2]], (205, 195, 180))
    rows = np.arange(SIDE)[:, None, None]
    horizon = SIDE * (0.62 - polar / 60)
    out = np.where(rows < horizon, np.array(sky, float), np.array(ground, float) * (0.9 + 0.1 * rows / SIDE))
    out = np.broadcast_to(out, (SIDE, SIDE, 3)).copy()
    coarse = draw.normal(0, 1, (8, 8))
    rough = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((SIDE, SIDE), Image.BICUBIC))
    out += 6 * rough[..., None] * (rows >= horizon)
    if name == "on a road":
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        out[(y > horizon) & (abs(y - SIDE * 0.93) < 2) & (x // 14 % 2 == 0)] = (230, 230, 220)
    if name == "at night":
        stars = draw.integers(0, SIDE, (14, 2))
        for y, x in stars:
            if y < horizon - 1:
                out[y, x] = (230, 230, 200)
    return np.clip(out, 0, 255).astype(np.uint8)
