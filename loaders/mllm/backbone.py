"""transformers' model of an MLLM without its head: hidden states of the layers that are wanted, and no layer more."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


class _StopForward(Exception):
    """Raised by a hook at the first layer that is not wanted."""


class MLLMBackbone(nn.Module):
    """Holds the library's model, because the host sets `.device`, which the library's makes read-only."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model: Any = model
        self.compute_dtype = dtype

    def move_unmanaged(self, device: torch.device) -> None:
        """Moves to `device` what the host moves only on a full load: buffers, norm-sized raw parameters.

        As new tensors: an inference tensor, which a move by the host in inference mode makes, takes no other data.
        """
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules():
                if hasattr(module, "comfy_cast_weights"):
                    continue
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    if tensor.device != device:
                        moved = tensor.to(device)
                        parameter = name in module._parameters
                        setattr(module, name, nn.Parameter(moved, requires_grad=False) if parameter else moved)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have an embedding."""
        return self.model.language_model.embed_tokens.num_embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (B, T, C) of ids (B, T), in the compute dtype."""
        return self.model.language_model.embed_tokens(ids, out_dtype=self.compute_dtype)

    def pooled_inputs(self, ids: Tensor, images: Tensor) -> dict[str, Any]:
        """What Gemma 4's decoder reads beside embeddings, for ids (1, T) and each token's image (1, T), 0 = none.

        Where its config asks for it, tokens of one image see each other in the layers of sliding attention.
        """
        decoder, extra = self.model.language_model, {}
        config, seen = decoder.config, images > 0
        if config.hidden_size_per_layer_input:
            table = decoder.embed_tokens_per_layer(
                ids.masked_fill(seen, config.pad_token_id), out_dtype=self.compute_dtype
            )
            extra["per_layer_inputs"] = rearrange(table, "b t (l c) -> b t l c", l=len(decoder.layers))
        if config.use_bidirectional_attention == "vision" and seen.any():
            at = torch.arange(ids.shape[1], device=ids.device)
            behind = at[:, None] - at
            together = seen[0, :, None] & (images[0, :, None] == images[0])
            near = (behind < config.sliding_window) & ((behind >= 0) | together)
            extra["attention_mask"] = {
                "full_attention": (behind >= 0)[None, None],
                "sliding_attention": near[None, None],
            }
        return extra

    def states(
        self,
        embeds: Tensor,
        positions: Tensor | None,
        wanted: tuple[int, ...],
        store: Callable,
        cache=None,
        **extra: Any,
    ) -> list[Tensor]:
        """Hidden states (1, T, C) of the layers `wanted` (ascending), each put through `store` as soon as it exists.

        State i < L is the input of decoder layer i, however the library of this release numbers it; state L is the
        final norm's output. `cache` is the library's, of the tokens before these, and gets their keys and values.
        """
        decoder, top = self.model.language_model, wanted[-1]
        count = len(decoder.layers)
        found, hooks = {}, []
        if 0 in wanted:
            found[0] = store(embeds)

        def read(number, module, args, kwargs):
            if number in wanted:
                found[number] = store(args[0] if args else kwargs["hidden_states"])
            if number == top:
                raise _StopForward

        if top > 0:
            try:
                for number in range(1, min(top, count - 1) + 1):
                    layer = decoder.layers[number]
                    hooks.append(layer.register_forward_pre_hook(partial(read, number), with_kwargs=True))
                # a mask of ones keeps the library from reading image positions as packed sequences
                before = 0 if cache is None else cache.get_seq_length()
                ones = embeds.new_ones(embeds.shape[0], before + embeds.shape[1], dtype=torch.long)
                extra = {"attention_mask": ones, "use_cache": cache is not None} | extra
                if cache is not None:
                    known = inspect.signature(decoder.forward).parameters
                    extra["cache" if "cache" in known else "past_key_values"] = cache  # transformers 5.24 or before
                out = decoder(inputs_embeds=embeds, position_ids=positions, **extra)
                found[count] = store(out.last_hidden_state)
            except _StopForward:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
        return [found[number] for number in wanted]
