"""A textured subject seen from known angles, by panda3d's software renderer; in a process of its own.

    python tests/small/render.py OUT AZIMUTH:POLAR ...

writes OUT/AZIMUTH_POLAR.png (256 px, alpha = the subject) and OUT/AZIMUTH_POLAR_front.png, where a red ball is drawn
before the subject's face, over everything.
"""

import sys
from math import cos, radians, sin
from pathlib import Path

from panda3d import core

for line in ("load-display p3tinydisplay", "window-type offscreen", "audio-library-name null", "framebuffer-alpha 1"):
    core.loadPrcFileData("", line)

from direct.showbase.ShowBase import ShowBase  # noqa: E402


def main(out: Path, views: list[tuple[float, float]]) -> None:
    base = ShowBase(windowType="none")
    properties = core.FrameBufferProperties()
    properties.setRgbaBits(8, 8, 8, 8)
    properties.setDepthBits(24)
    base.makeDefaultPipe()
    size, hidden = core.WindowProperties.size(256, 256), core.GraphicsPipe.BFRefuseWindow
    window = base.graphicsEngine.makeOutput(base.pipe, "view", 0, properties, size, hidden)
    window.setClearColorActive(True)
    window.setClearColor((0, 0, 0, 0))
    subject = base.loader.loadModel("models/panda-model")
    subject.reparentTo(base.render)
    low, high = subject.getTightBounds()
    middle, size = (low + high) / 2, (high - low).length()
    light = base.render.attachNewNode(core.AmbientLight("all round"))
    base.render.setLight(light)
    ball = base.loader.loadModel("models/smiley")
    ball.reparentTo(base.render)
    ball.setTextureOff(1)
    ball.setColor(1, 0, 0, 1)
    ball.setLightOff(1)
    ball.setScale(size * 0.03)
    ball.setPos(middle.x, middle.y - size * 0.35, middle.z)  # the model faces -y
    ball.setDepthTest(False)
    ball.setBin("fixed", 0)
    lens = core.OrthographicLens()
    lens.setFilmSize(size * 1.1, size * 1.1)
    lens.setNearFar(1, size * 10)
    camera = base.makeCamera(window, lens=lens)
    camera.reparentTo(base.render)
    for azimuth, polar in views:
        a, p = radians(azimuth), radians(polar)
        camera.setPos(middle + type(middle)(sin(a) * cos(p), -cos(a) * cos(p), sin(p)) * size * 3)
        camera.lookAt(middle)
        for name, shown in (("", False), ("_front", True)):
            (ball.show if shown else ball.hide)()
            base.graphicsEngine.renderFrame()
            base.graphicsEngine.renderFrame()
            picture = core.PNMImage()
            window.getScreenshot(picture)
            picture.write(core.Filename.fromOsSpecific(str(out / f"{azimuth:g}_{polar:g}{name}.png")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(map(float, view.split(":"))) for view in sys.argv[2:]])
