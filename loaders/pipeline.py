"""All four parts at once, compared by their headers before any weights are read."""


def load_pipeline(
    diffusion_model: str,
    vae: str,
    mllm: str,
    dla: str | None = None,
    weight_dtype: str = "default",
    mllm_weight_dtype: str = "default",
):
    """MODEL, VAE, MLLM and DLA of files, by names and dtypes as each one's own loader takes them.

    `dla` None = no DLA but the MLLM's last layer. Raises ValueError before anything is loaded, where the DLA was made
    for another MLLM or another DiT.
    """
    from .dit import load_dit
    from .mllm import load_mllm
    from .vae import load_vae

    check_headers(diffusion_model, mllm, dla)
    loaded_dla = None
    if dla is not None:
        from .dla import load_dla

        loaded_dla = load_dla(dla)
    loaded_mllm = load_mllm(mllm, mllm_weight_dtype)
    return load_dit(diffusion_model, weight_dtype), load_vae(vae), loaded_mllm, loaded_dla


def check_headers(diffusion_model: str, mllm: str, dla: str | None) -> None:
    """Compares what the files say: DLA metadata, the MLLM's config.json, the DiT's header. Raises ValueError."""
    import folder_paths

    from .dit import read_header
    from .mllm import read_info

    dit = read_header(folder_paths.get_full_path_or_raise("diffusion_models", diffusion_model))
    info = read_info(mllm)
    if dla is None:
        if dit.context_width not in (None, info.width):
            raise ValueError(
                f"Without a DLA the MLLM's last layer goes to the DiT as it is, but {mllm!r} is {info.width} wide and "
                f"{diffusion_model!r} reads a context {dit.context_width} wide. Choose a DLA trained for this pair."
            )
        return
    from .dla import check_dit, read_config

    config = read_config(dla)
    try:
        config.check_mllm(info)
    except ValueError as error:
        raise ValueError(f"DLA {dla!r} and MLLM {mllm!r} do not belong together: {error}") from None
    check_dit(config, dla, dit.context_width, dit.backbone.name if dit.backbone else "", repr(diffusion_model))
