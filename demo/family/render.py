"""Draws the demo's toys with panda3d's software renderer.

Every toy is made of prisms (a wooden pull-toy): a profile in the plane of length and height, extruded along the width.
The toy faces -y, x is its width, z up, in units of half its length.
"""

from functools import cache
from math import cos, pi, radians, sin

import numpy as np
from panda3d import core
from PIL import Image

from . import textures
from .layout import SIDE
from .world import COLOURS, Picture, Toy, View

core.loadPrcFileData("", "load-display p3tinydisplay\nwindow-type offscreen\naudio-library-name null")
core.loadPrcFileData("", "framebuffer-alpha 1\nnotify-level error")

from direct.showbase.ShowBase import ShowBase  # noqa: E402

SUPERSAMPLING = 2  # the renderer has no antialiasing
BODIES = {  # (profile of (y, z), half the width) of the body, and of the top
    "car": (
        [(-1, 0.25), (1, 0.25), (1, 0.95), (-1, 0.85)], 0.5,
        [(-0.3, 0.9), (0.85, 0.95), (0.6, 1.45), (0, 1.45)], 0.42,
    ),
    "truck": (
        [(-0.2, 0.25), (1, 0.25), (1, 1.45), (-0.2, 1.45)], 0.5,
        [(-1, 0.25), (-0.25, 0.25), (-0.25, 1.1), (-0.75, 1.1), (-1, 0.7)], 0.45,
    ),
    "train": (
        [(-1, 0.25), (0.3, 0.25), (0.3, 1), (-1, 1)], 0.4,
        [(0.3, 0.25), (1, 0.25), (1, 1.5), (0.2, 1.5), (0.3, 1.3)], 0.5,
    ),
    "boat": (
        [(-0.85, 0.25), (0.95, 0.25), (1, 0.9), (-1.15, 0.9)], 0.5,
        [(-0.1, 0.9), (0.7, 0.9), (0.7, 1.45), (0.1, 1.45)], 0.35,
    ),
    "duck": (
        [(-0.75, 0.25), (0.7, 0.25), (1.1, 1.05), (0.6, 0.85), (-0.8, 0.85), (-0.95, 0.5)], 0.42,
        [(-0.9, 0.85), (-0.3, 0.85), (-0.15, 1.15), (-0.3, 1.5), (-0.8, 1.5), (-0.98, 1.15)], 0.32,
    ),
}  # fmt: skip
DECAL_CENTRES = {"car": (0, 0.58), "truck": (0.4, 0.85), "train": (-0.35, 0.62), "boat": (0, 0.58), "duck": (0, 0.56)}


class Renderer:
    """An offscreen window. Only one may exist in a process."""

    def __init__(self):
        self.base = ShowBase(windowType="none")
        properties = core.FrameBufferProperties()
        properties.setRgbaBits(8, 8, 8, 8)
        properties.setDepthBits(24)
        self.base.makeDefaultPipe()
        size = core.WindowProperties.size(SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING)
        self.window = self.base.graphicsEngine.makeOutput(
            self.base.pipe, "view", 0, properties, size, core.GraphicsPipe.BFRefuseWindow
        )
        self.window.setClearColorActive(True)
        self.window.setClearColor((0, 0, 0, 0))
        ambient = core.AmbientLight("ambient")
        ambient.setColor((0.62, 0.62, 0.62, 1))
        self.base.render.setLight(self.base.render.attachNewNode(ambient))
        sun = core.DirectionalLight("sun")
        sun.setColor((0.5, 0.5, 0.5, 1))
        self.sun = self.base.render.attachNewNode(sun)
        self.base.render.setLight(self.sun)
        lens = core.PerspectiveLens()
        lens.setFov(20)
        lens.setNearFar(1, 40)
        self.camera = self.base.makeCamera(self.window, lens=lens)
        self.camera.reparentTo(self.base.render)

    def toys(self, toys: tuple[Toy, ...], view: View) -> Image.Image:
        """SIDE x SIDE px RGBA: the toys and their shadows on a transparent background."""
        root = self.base.render.attachNewNode("toys")
        azimuth, polar = radians(view.azimuth), radians(view.polar)
        for index, toy in enumerate(toys):
            node = _build(toy)
            node.reparentTo(root)
            if len(toys) > 1:  # side by side as the camera sees them, each in the view
                offset = (index - 0.5) * 2.15
                node.setPos(cos(azimuth) * offset, sin(azimuth) * offset, 0)
        middle = core.Point3(0, 0, 0.75)
        distance = 8.9 if len(toys) == 1 else 15
        direction = core.Point3(sin(azimuth) * cos(polar), -cos(azimuth) * cos(polar), sin(polar))
        self.camera.setPos(middle + direction * distance)
        self.camera.lookAt(middle)
        self.sun.setHpr(self.camera.getH() + 35, -50, 0)
        self.base.graphicsEngine.renderFrame()
        self.base.graphicsEngine.renderFrame()
        side = SIDE * SUPERSAMPLING
        data = self.window.getScreenshot().getRamImageAs("RGBA")
        pixels = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(side, side, 4)[::-1])
        root.removeNode()
        large = Image.fromarray(pixels, "RGBA").convert("RGBa")  # averaged with premultiplied alpha
        return large.resize((SIDE, SIDE), Image.BOX).convert("RGBA")

    def picture(self, picture: Picture) -> Image.Image:
        """SIDE x SIDE px RGB: the toys in their place."""
        image = textures.background(picture.place, picture.view.polar, picture.seed).convert("RGBA")
        image.alpha_composite(self.toys(picture.toys, picture.view))
        return image.convert("RGB")


def _build(toy: Toy) -> core.NodePath:
    root = core.NodePath("toy")
    body, half, top, top_half = BODIES[toy.kind]
    _add_prism(root, body, half, COLOURS[toy.body], _pattern(toy.pattern))
    _add_prism(root, top, top_half, COLOURS[toy.top])
    wheel = [(0.3 * cos(i * pi / 6), 0.3 * sin(i * pi / 6)) for i in range(12)]
    for y in (-0.6, 0.6):
        for side in (-1, 1):
            profile = [(y + a, 0.3 + b) for a, b in wheel]
            _add_prism(root, profile, 0.1, COLOURS[toy.wheels], x=side * (half + 0.08))
    front, back = min(y for y, _ in body + top), max(y for y, _ in body)
    if toy.kind == "duck":  # beak
        _add_prism(root, [(-1.3, 1.08), (-0.95, 1.0), (-0.95, 1.22)], 0.16, (245, 170, 30))
    elif toy.kind == "train":  # chimney
        _add_prism(root, [(-0.85, 1), (-0.55, 1), (-0.55, 1.45), (-0.85, 1.45)], 0.15, COLOURS[toy.top])
    for x in (-0.3, 0.3):  # lamps, pale in front and red behind
        for y1, y2, colour in ((front - 0.05, front + 0.1, (255, 250, 200)), (0.95, 1.05, (150, 0, 0))):
            _add_prism(root, [(y1, 0.36), (y2, 0.36), (y2, 0.54), (y1, 0.54)], 0.09, colour, x=x)
    y, z = DECAL_CENTRES[toy.kind]
    decal = _decal(toy.decal, toy.decal_colour)
    _add_decal(root, decal, 0.62, (-half - 0.02, y, z), -90)
    _add_decal(root, decal, 0.62, (half + 0.02, y, z), 90)
    back = {"train": 1.03, "duck": back + 0.03 - 0.2}.get(toy.kind, back + 0.03)
    _add_decal(root, decal, 0.62, (0, back, z + 0.1), 180)
    _add_decal(root, decal, 0.5, (0, front - 0.06, 0.62 if toy.kind != "duck" else 0.55), 0)
    shadow = core.CardMaker("shadow")
    shadow.setFrame(-0.75, 0.75, -1.25, 1.25)
    node = root.attachNewNode(shadow.generate())
    node.setP(-90)
    node.setZ(0.0)
    node.setTexture(_shadow())
    node.setTransparency(core.TransparencyAttrib.MAlpha)
    node.setLightOff(1)
    node.setBin("background", 0)
    node.setDepthWrite(False)
    return root


def _add_prism(root, profile: list, half: float, colour: tuple, texture: core.Texture | None = None, x: float = 0):
    """A nearly convex profile of (y, z), anticlockwise as seen from +x, extruded from x - half to x + half."""
    data = core.GeomVertexData("prism", core.GeomVertexFormat.getV3n3t2(), core.Geom.UHStatic)
    vertex, normal, uv = (core.GeomVertexWriter(data, name) for name in ("vertex", "normal", "texcoord"))
    triangles = core.GeomTriangles(core.Geom.UHStatic)
    count = 0

    def face(points: list, direction: tuple) -> None:
        nonlocal count
        for px, py, pz in points:
            vertex.addData3(px, py, pz)
            normal.addData3(*direction)
            uv.addData2(py if abs(direction[0]) > 0.5 else px, pz if abs(direction[2]) < 0.9 else py)
        for i in range(1, len(points) - 1):
            triangles.addVertices(count, count + i, count + i + 1)
        count += len(points)

    face([(x + half, y, z) for y, z in profile], (1, 0, 0))
    face([(x - half, y, z) for y, z in profile[::-1]], (-1, 0, 0))
    for (y1, z1), (y2, z2) in zip(profile, profile[1:] + profile[:1]):
        length = ((y2 - y1) ** 2 + (z2 - z1) ** 2) ** 0.5
        direction = (0, (z2 - z1) / length, -(y2 - y1) / length)
        face([(x - half, y1, z1), (x - half, y2, z2), (x + half, y2, z2), (x + half, y1, z1)], direction)
    geom = core.Geom(data)
    geom.addPrimitive(triangles)
    node = core.GeomNode("prism")
    node.addGeom(geom)
    path = root.attachNewNode(node)
    path.setTwoSided(True)
    path.setColor(*(c / 255 for c in colour), 1)
    if texture is not None:
        path.setTexture(texture)


def _add_decal(root: core.NodePath, texture: core.Texture, size: float, position: tuple, heading: float) -> None:
    maker = core.CardMaker("decal")
    maker.setFrame(-size / 2, size / 2, -size / 2, size / 2)
    node = root.attachNewNode(maker.generate())
    node.setPos(*position)
    node.setH(heading)
    node.setTexture(texture)
    node.setTransparency(core.TransparencyAttrib.MBinary)
    node.setLightOff(1)


@cache
def _pattern(name: str) -> core.Texture | None:
    return None if name == "plain" else _texture(textures.pattern(name), core.SamplerState.WMRepeat)


@cache
def _decal(name: str, colour: str) -> core.Texture:
    return _texture(textures.decal(name, colour))


@cache
def _shadow() -> core.Texture:
    return _texture(textures.shadow())


def _texture(image: Image.Image, wrap: int | None = None) -> core.Texture:
    texture = core.Texture()
    texture.setup2dTexture(*image.size, core.Texture.TUnsignedByte, core.Texture.FRgba)
    red, green, blue, alpha = image.transpose(Image.FLIP_TOP_BOTTOM).split()
    texture.setRamImage(Image.merge("RGBA", (blue, green, red, alpha)).tobytes())
    texture.setMagfilter(core.SamplerState.FTLinear)
    texture.setMinfilter(core.SamplerState.FTLinear)
    if wrap is not None:
        texture.setWrapU(wrap)
        texture.setWrapV(wrap)
    return texture
