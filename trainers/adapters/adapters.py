"""Low-rank adapters beside a frozen network, with a strength that may change between two calls of one step.

An adapter adds to its layer's output (Hu et al. 2021: W x + s * alpha/rank * B A x; layers.py has the others). It never
builds a changed weight: that would cost a dense weight gradient per layer, and would not work on quantised or offloaded
weights.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..rng import make_generator
from ..settings import LOKR, AdapterSettings, parse_block_rules
from .layers import ADAPTER_LAYERS, LoraLayer, is_linear, layer_features

# Layer names over all families that ComfyUI loads: UNet attn1/attn2 and their proj_in/out, Flux and HunyuanVideo's
# fused single-stream linear1/2, and the attention and feed-forward names of the other transformers, of T5 and of
# diffusers too. Diffusers keeps whole transformers under `attentions.`, and a proj_out at the top is a model's last
# layer: neither makes a layer attention.
ATTENTION_PATTERN = re.compile(
    r"(^|\.)\w*(attn|[aA]ttention(?!s\.))\w*\.|\.(proj_in|proj_out)$|(^|\.)single_blocks\.\d+\.linear[12]$"
    r"|(^|\.)blocks\.\d+\.(q|k|v|attn_out)$"  # CogVideoX
    r"|(^|\.)(audio|music)_injector\.injector\.\d+\.[qkvo]$"  # Wan's relatives
    r"|\bface_adapter\.fuser_blocks\.\d+\.linear"
)
MLP_PATTERN = re.compile(
    r"(^|\.)(ff|ff_context|ffn|ff_[it]|\w*feed_forward|DenseReluDense|\w*mlp([CX]|_[xy])?)\.|\.proj_mlp$"
    r"|(^|\.)blocks\.\d+\.ff_(proj|out)$"  # CogVideoX
    r"|(^|\.)channelwise\.\d+$|\bblock\.layer[12]$"  # Stable Cascade, Cosmos 1
)
# Modulation, time and guidance embedders steer the whole network. HiDream-O1's `visual` reads reference images.
MODULATION_PATTERN = re.compile(
    r"mod(ulation)?s?\b|adaLN|embed|time_|(^|\.)norm|(^|\.)\w*norm\w*\.|\bllm_adapter\b|^visual\.blocks\.",
    re.IGNORECASE,
)
NEVER_ADAPTED = "distilled_guidance"  # Chroma's distilled modulation breaks when it is trained
# The first and last convolution of a UNet (four channels on one side) and a transformer's patch embedding.
STEM_PATTERN = re.compile(r"^(conv_in|conv_out|input_blocks\.0\.0|out\.\d+)$|embed|^img_in\.")


def make_layer_filter(settings: AdapterSettings):
    """name -> bool for linear layers and 1x1 convolutions."""
    if settings.targets == "regex":
        pattern = re.compile(settings.pattern)
        return lambda name: bool(pattern.search(name))
    if settings.targets == "all linear":
        return lambda name: True
    groups = (ATTENTION_PATTERN,) if settings.targets == "attention" else (ATTENTION_PATTERN, MLP_PATTERN)
    return lambda name: not MODULATION_PATTERN.search(name) and any(group.search(name) for group in groups)


def text_adapter_settings(settings: AdapterSettings) -> AdapterSettings:
    """The settings of the text encoder's adapters. A regular expression and the rules of `blocks` are written for the
    layer names of the diffusion model, and a text encoder has no 3x3 convolutions: none of these apply there."""
    targets = "attention+mlp" if settings.targets in ("regex", "all linear") else settings.targets
    return replace(settings, targets=targets, pattern="", conv=False, blocks="")


def is_pointwise(layer) -> bool:
    return layer.weight.ndim == 2 or all(k == 1 for k in layer.kernel_size)


def find_adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution layer that may be trained, found by what it has: quantised layers are no subclass of
    nn.Linear."""
    return {
        name: m
        for name, m in network.named_modules()
        if name and NEVER_ADAPTED not in name and (is_linear(m) or is_convolution(m))
    }


def is_convolution(m) -> bool:
    weight = getattr(m, "weight", None)
    plain = getattr(m, "groups", 0) == 1 and not getattr(m, "transposed", False)
    return hasattr(m, "kernel_size") and plain and weight is not None and weight.ndim in (4, 5)


def select_target_layers(network: nn.Module, settings: AdapterSettings) -> dict[str, nn.Module]:
    """Layers that get an adapter, in the network's own order. Raises ValueError when there are none."""
    want = make_layer_filter(settings)
    layers = find_adaptable_layers(network)
    chosen = {
        n: m
        for n, m in layers.items()
        if (want(n) if is_pointwise(m) else settings.conv and not STEM_PATTERN.search(n))
    }
    if not chosen:
        some = ", ".join(list(layers)[:6])
        raise ValueError(
            f"No layer matches targets = {settings.targets!r}"
            + (f", pattern = {settings.pattern!r}" if settings.pattern else "")
            + f"; nothing would be trained. The model has {len(layers)} layers such as {some}."
        )
    return chosen


def check_unused_block_rules(rules, names):
    """ValueError for a rule of `blocks` that decides nothing."""
    taken = {name: find_block_rule(name, rules) for name in names}
    for rule in rules:
        if rule in taken.values():
            continue
        if found := [name for name in names if rule.pattern.search(name)]:
            raise ValueError(
                f"{rule.line} comes too late: {found[0]} and all else that it matches is taken by an earlier line. "
                "Move it up."
            )
        raise ValueError(
            f"{rule.line} matches none of the {len(names)} layers that targets chooses, such as "
            f"{', '.join(list(names)[:4])}."
        )


def find_block_rule(name: str, rules):
    """The first rule that matches, or None."""
    return next((rule for rule in rules if rule.pattern.search(name)), None)


def build_adapter_layer(name, layer, settings: AdapterSettings, rule, rng):
    """The adapter of one layer. Raises ValueError that names the layer."""
    rank, alpha = (settings.rank, settings.alpha) if is_pointwise(layer) else (settings.conv_rank, settings.conv_alpha)
    alpha = alpha or rank
    if rule is not None and rule.rank is not None:
        rank, alpha = rule.rank, alpha / rank * rule.rank  # the same scale, unless the rule says otherwise
    if rule is not None and rule.alpha is not None:
        alpha = rule.alpha or rank
    more = {"factor": settings.factor} if settings.algorithm == LOKR else {}
    try:
        low = ADAPTER_LAYERS[settings.algorithm](layer, rank, alpha, settings.rslora, rng, **more)
    except ValueError as error:
        raise ValueError(
            f"Layer {name}: {error}. Choose a rank of at most {min(layer_features(layer))}, or narrow the adapter's "
            "targets."
        ) from None
    for part, p in low.named_parameters():
        p.rate = (rule.lr if rule else 1.0) * (
            settings.up_rate if part in low.fast_parts else 1.0
        )  # of the run's; read by make_optimizer
    return low


@dataclass(frozen=True)
class RankDropout:
    """Leaves out a share of some values, and a share of whole ranks for each image, and enlarges the rest, the same
    ones whenever it is
    asked: a block that is computed again for its gradient must drop what it dropped before."""

    value_share: float
    rank_share: float
    seed: int

    def __call__(self, inner: Tensor, axis: int) -> Tensor:
        """`axis`: that of the ranks; images lie along the first."""
        rng = torch.Generator(inner.device).manual_seed(self.seed)
        inner = apply_dropout(inner, inner.shape, self.value_share, rng) if self.value_share else inner
        whole = [1] * inner.ndim
        whole[0], whole[axis] = inner.shape[0], inner.shape[axis]
        return apply_dropout(inner, whole, self.rank_share, rng) if self.rank_share else inner


def apply_dropout(inner: Tensor, shape, share: float, rng) -> Tensor:
    """inner with a share of values of this shape left out, and the same mean."""
    kept = torch.rand(shape, generator=rng, device=inner.device) >= share
    return inner * (kept / (1 - share)).to(inner.dtype)


class Adapters(nn.Module):
    """The adapters of one network: `layers` by module path, and one strength for all of them."""

    replacement: Adapters | None  # that these give way to; kept where torch looks for no submodules

    def __init__(self, network: nn.Module, settings: AdapterSettings, rng: torch.Generator | None = None):
        super().__init__()
        chosen, rules = select_target_layers(network, settings), parse_block_rules(settings.blocks)
        check_unused_block_rules(rules, chosen)
        of = {name: find_block_rule(name, rules) for name in chosen}
        self.layers = {name: layer for name, layer in chosen.items() if (rule := of[name]) is None or rule.rank != 0}
        if not self.layers:
            raise ValueError("blocks leaves out every layer (rank=0); nothing would be trained.")
        self.lows = nn.ModuleDict(
            {
                name.replace(".", "/"): build_adapter_layer(name, m, settings, of[name], rng)
                for name, m in self.layers.items()
            }
        )
        self.settings, self.strength = settings, 1.0
        self.dropout_seed: int | None = None  # of a step that leaves something out
        self._hooks: list = []
        self.slot_name = f"trainyard {id(self)}"  # where a layer holds its adapter while these are attached
        self.__dict__["replacement"] = None

    def adapter_for(self, name: str) -> LoraLayer:
        return self.lows[name.replace(".", "/")]  # pyright: ignore[reportReturnType]  a ModuleDict yields Modules

    def attach(self):
        """Start adding to the layers' outputs; `detach` takes every hook off again. Attaching twice adds nothing
        twice."""
        self.detach()
        for number, (name, layer) in enumerate(self.layers.items()):
            layer.__dict__[self.slot_name] = (
                self.adapter_for(name),
                number,
            )  # and one hook for all layers, so that compiled blocks can share a program
            self._hooks.append(layer.register_forward_hook(self._add, with_kwargs=True))

    def _add(self, layer, args, kwargs, out):
        if self.strength == 0:
            return out
        low, number = getattr(layer, self.slot_name)
        x = args[0] if args else kwargs["input"]
        left_out, drop = self.layer_dropout(number)
        return out + low.output_change(
            layer, x, out, 0.0 if left_out else self.strength, drop
        )  # 0: autograd still finds its way

    def layer_dropout(self, number) -> tuple[bool, RankDropout | None]:
        """(whether layer `number` is left out, what leaves out its inner values) in this step."""
        if self.dropout_seed is None:
            return False, None
        s, seed = self.settings, (self.dropout_seed + number * 0x9E3779B97F4A7C15) % 2**63
        coin = float(torch.rand(1, generator=make_generator(seed))) if s.module_dropout else 1.0
        return coin < s.module_dropout, RankDropout(
            s.dropout, s.rank_dropout, seed
        ) if s.dropout or s.rank_dropout else None

    @property
    def has_dropout(self) -> bool:
        """Whether a step leaves anything out."""
        return bool(self.settings.dropout or self.settings.rank_dropout or self.settings.module_dropout)

    @contextlib.contextmanager
    def dropout_active(self, rng: torch.Generator):
        """A step with the dropout of the settings; rng is asked only when there is any. Everywhere else nothing is left
        out."""
        before = self.dropout_seed
        if self.has_dropout:
            self.dropout_seed = int(torch.randint(2**62, (1,), generator=rng))
        try:
            yield
        finally:
            self.dropout_seed = before

    def detach(self):
        while self._hooks:
            self._hooks.pop().remove()
        for layer in self.layers.values():
            layer.__dict__.pop(self.slot_name, None)

    @contextlib.contextmanager
    def attached(self):
        """Attached while inside; where they are attached already they stay so afterwards."""
        if self._hooks:
            yield self
            return
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    @contextlib.contextmanager
    def at_strength(self, strength: float):
        """The same adapters at another strength; the previous one comes back, after errors too."""
        before, self.strength = self.strength, strength
        try:
            yield self
        finally:
            self.strength = before

    @contextlib.contextmanager
    def replaced_by(self, guest: Adapters | None):
        """At strength 0, with the guest attached in their place, if there is one."""
        before = self.replacement
        self.__dict__["replacement"] = guest  # lent, not owned
        try:
            with self.at_strength(0), contextlib.nullcontext() if guest is None else guest.attached():
                yield
        finally:
            self.__dict__["replacement"] = before

    @property
    def compile_strength(self) -> float | None:
        """The strength that a compiled block would be made for; None while it could not follow: dropout draws anew in
        every step, and a guest brings hooks of its own."""
        return None if self.dropout_seed is not None or self.replacement is not None else self.strength

    def adapter_signature(self, layer) -> tuple | None:
        """Equal for layers whose adapters differ in their numbers only."""
        low, _ = getattr(layer, self.slot_name, (None, 0))
        return low and (type(low), *(tuple(p.shape) for p in low.parameters()))

    def capture_context(self):
        """A context that brings back today's strength, dropout and guest later: for a block that is computed again."""
        strength, seed, guest = self.strength, self.dropout_seed, self.replacement

        @contextlib.contextmanager
        def again():
            before, self.dropout_seed = self.dropout_seed, seed
            try:
                with self.at_strength(strength), contextlib.nullcontext() if guest is None else guest.attached():
                    yield
            finally:
                self.dropout_seed = before

        return again

    def keep_layers(self, names) -> Adapters:
        """These adapters without those of all other layers."""
        for name in [name for name in self.layers if name not in names]:
            del self.layers[name]
            del self.lows[name.replace(".", "/")]
        return self

    def load(self, by_layer: dict[str, dict[str, Tensor]], pad_ranks=False):
        """Start from the tensors of a file, by layer path and suffix. Layers that the file lacks start at no change.
        pad_ranks: layers of a lower rank than here get further ranks that change nothing yet.
        Raises ValueError when something in the file would be lost."""
        if lost := [name for name in by_layer if name not in self.layers]:
            raise ValueError(
                f"start_from has {len(lost)} layers that are not trained here, such as {lost[0]}, and they would be "
                "lost. Choose targets (and conv, text_encoder, blocks) that cover them."
            )
        for name, tensors in by_layer.items():
            tensors = {PEFT_SUFFIXES.get(suffix, suffix): value for suffix, value in tensors.items()}
            low = self.adapter_for(name)
            try:
                low.load(self.layers[name], low.pad_rank(tensors) if pad_ranks else tensors)
            except ValueError as error:
                raise ValueError(f"start_from does not fit at layer {name}: {error}.") from None

    def export_tensors(self, key=None) -> tuple[dict[str, Tensor], list[str]]:
        """(file tensors, names of untouched layers). `key` maps a layer's path to its name in the file. Adapters whose
        output is still zero (layers the model never calls) are left out: loading them would change nothing."""
        key = key or (lambda name: kohya_lora_key("lora_unet", name))
        out, untouched = {}, []
        for name in self.layers:
            low = self.adapter_for(name)
            if low.is_zero():
                untouched.append(name)
                continue
            for suffix, value in low.export_tensors(self.layers[name]).items():
                out[f"{key(name)}.{suffix}"] = value.detach().to("cpu", torch.float32).clone().contiguous()
        return out, untouched


def kohya_lora_key(prefix: str, name: str) -> str:
    """The key every tool loads: lora_unet_double_blocks_0_img_attn_qkv (kohya-ss sd-scripts, networks/lora.py)."""
    return f"{prefix}_{name.replace('.', '_')}"


LORA_KEY_SUFFIX = re.compile(
    r"\.(lora_(up|down|mid|A|B)(\.weight)?|hada_\w+|lokr_\w+|oft_blocks|alpha|dora_scale|diff(_b)?|w_norm|b_norm)$"
)
PEFT_SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}  # peft's names


def group_tensors_by_layer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by layer key and suffix."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        base = LORA_KEY_SUFFIX.sub("", key)
        found.setdefault(base, {})[key[len(base) + 1 :]] = value
    return found
