"""Fills a cache of latents and features, as one of several processes that do so at once.

    python common/bootstrap.py tests.small.filling FOLDER MLLM_FOLDER [PAUSE]

Pictures are FOLDER/../*.png. Prints a line when everything is loaded, waits for one, then prints a line when an encoder
begins and when its result is on the disk; PAUSE is how many seconds each encoder takes besides.
"""

import os
import sys
import time
from pathlib import Path

PROMPTS = ("a red fox", "an owl asleep in the snow", "")


def main(folder: Path, mllm_folder: Path, pause: float = 0.0) -> None:
    from ...common.bootstrap import start_host

    start_host(os.environ["COMFYUI_PATH"])
    import torch

    from ...loaders.backbones import BACKBONES
    from ...loaders.mllm.huggingface import load_folder
    from ...training.data import feature_cache, latent_cache
    from .dit import TinyVAE

    torch.set_num_threads(1)
    pictures = sorted(folder.parent.glob("*.png"))
    vae, mllm = TinyVAE(BACKBONES["flux"]), load_folder(mllm_folder)

    def slow(encode, kind):
        def run(*args, **kwargs):
            print("encodes", kind, flush=True)
            time.sleep(pause)
            return encode(*args, **kwargs)

        return run

    def reported(save):
        def run(path, *rest):
            save(path, *rest)
            print("saved", path.parent.name, flush=True)

        return run

    vae.encode, mllm.encode = slow(vae.encode, "latents"), slow(mllm.encode, "features")
    for module in (feature_cache, latent_cache):
        module.save_tensors = reported(module.save_tensors)
    latents = latent_cache.LatentCache(vae, folder / "latents")
    features = feature_cache.FeatureSource(mllm, folder=folder / "features", layers=(1, 3))
    print("ready", flush=True)
    sys.stdin.readline()
    latents.prefetch((picture, side, 64) for picture in pictures for side in (64, 96))
    features.prefetch((prompt, (picture,)) for picture in pictures for prompt in PROMPTS)
    for picture in pictures:  # all is there, and whole
        assert latents.get(picture, 64, 64).isfinite().all()
        assert all(features.get(prompt, (picture,)).features.hidden_states.isfinite().all() for prompt in PROMPTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:]))
