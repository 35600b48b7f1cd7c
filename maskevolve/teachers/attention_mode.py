"""The softmax attention that modules take, seen while they run. The model is not touched.

Hooks mark which module is running; a torch-function mode sees the queries and keys that it hands to
`scaled_dot_product_attention`, the softmax that it takes itself, or the weights of nn.MultiheadAttention. So norms,
rotary embeddings and biases are included. All of it is gone when the context ends.
"""

import math
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode

from ..checks import check_memory

Enter = Callable[[nn.Module, list[Tensor]], None]
Take = Callable[[nn.Module, Tensor], None]


class AttentionMode(TorchFunctionMode):
    """Sees the attention of modules, as a context.

    `enter` is called with a module that begins and its tokens, [B, tokens, width], in a list that is empty where it was
    given none; `take` with a module and the softmax that it takes, [B, heads, tokens, tokens] where that is attention.
    """

    def __init__(self, modules: Iterable[nn.Module], enter: Enter, take: Take) -> None:
        super().__init__()
        self.modules, self.enter, self.take = list(modules), enter, take
        self.running: nn.Module | None = None

    def __enter__(self) -> Any:
        self.handles = [module.register_forward_pre_hook(self._begin, with_kwargs=True) for module in self.modules]
        self.handles += [module.register_forward_hook(self._end) for module in self.modules]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running = module
        given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.ndim == 3][:1]
        # nn.MultiheadAttention says whether it takes [tokens, B, width].
        self.enter(module, given if getattr(module, "batch_first", True) else [each.transpose(0, 1) for each in given])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, module = kwargs or {}, self.running
        if module is None:
            return func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            self.take(module, _attention(*args, **kwargs))
        elif func is multi_head_attention_forward:  # nn.MultiheadAttention, whose inside no mode sees
            self.take(module, _attention_of_multi_head(*args, **kwargs))
        result = func(*args, **kwargs)
        if func in (Tensor.softmax, torch.softmax, softmax):
            self.take(module, result)
        return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The softmax that scaled_dot_product_attention takes of these arguments, before dropout, in float32 at least."""
    with torch.autocast(query.device.type, enabled=False):
        query, key = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (query, key))
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        shape = [*query.shape[:-1], key.shape[-2]]
        check_memory(f"reading attention {shape}", 8 * math.prod(shape), query.device)
        logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        alone = (logits == -torch.inf).all(-1, keepdim=True)  # attends to nothing
        return logits.softmax(-1).masked_fill(alone, 0.0)


def _attention_of_multi_head(*args: Any, **kwargs: Any) -> Tensor:
    """The same of multi_head_attention_forward, but [B, 1, tokens, tokens], the mean over its heads."""
    call = signature(multi_head_attention_forward).bind(*args, **kwargs)
    for name, value in call.arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            call.arguments[name] = value.float()
    call.arguments.update(training=False, need_weights=True, average_attn_weights=True)
    with torch.autocast(call.arguments["query"].device.type, enabled=False):
        attention = multi_head_attention_forward(*call.args, **call.kwargs)[1]
    assert attention is not None
    return attention[:, None] if attention.ndim == 3 else attention[None, None]
