"""The softmax attention that modules take, seen while they run. The model is not touched.

Hooks mark which module is running; a torch-function mode sees the queries and keys that it hands to
`scaled_dot_product_attention`, the softmax that it takes itself, or the weights of nn.MultiheadAttention. So norms,
rotary embeddings and biases are included, whatever the model does to get there. All of it is gone when the call ends.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode

Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class AttentionMode(TorchFunctionMode):
    """Sees the attention of modules while they run.

    `enter` is called with each of them and its arguments, when it begins; `take` with a module and the softmax that it
    takes, [B, heads, tokens, tokens] where that is attention.
    """

    def __init__(self, modules: Iterable[nn.Module], enter: Enter, take: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.modules, self.enter, self.take = list(modules), enter, take
        self.running: nn.Module | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Know which of the modules is running, and see what it does, for as long as the context lasts."""
        handles = [module.register_forward_pre_hook(self._begin, with_kwargs=True) for module in self.modules]
        handles += [module.register_forward_hook(self._end) for module in self.modules]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running = module
        self.enter(module, args, kwargs)

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
    """The same of multi_head_attention_forward, [B, 1, tokens, tokens], the mean over its heads."""
    call = signature(multi_head_attention_forward).bind(*args, **kwargs)
    for name, value in call.arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            call.arguments[name] = value.float()
    call.arguments.update(training=False, need_weights=True, average_attn_weights=True)
    with torch.autocast(call.arguments["query"].device.type, enabled=False):
        attention = multi_head_attention_forward(*call.args, **call.kwargs)[1]
    assert attention is not None
    return attention[:, None] if attention.ndim == 3 else attention[None, None]
