"""The mapping table between Hugging Face's and Megatron's tensors, both directions.

A rule is three facts: the Megatron name, the Hugging Face names, the layout. A layout is a view
plus a shard axis. Every view has three axes, `[blocks, rows, columns]`, and every tensor anyone
stores, a Hugging Face weight or one rank's shard, is a *box* of such a view, in row-major order:

    linear_qkv   [ng, (np/ng + 2) hn, h]   a block is a query group: its q heads, its k, its v
    linear_fc1   [2, f, h]                 gate, up; each rank takes the same rows of both
    linear_proj  [1, h, np hn]             cut by columns; linear_fc2 [1, h, f] too
    embedding    [1, vocabulary, h]        cut by rows, output_layer the same
    norms        [1, h, 1]                 every rank holds them whole

(`np` query heads, `ng` query groups, `hn` head width, `h` hidden, `f` ffn.) Where two boxes of one
view overlap, one file's bytes are another's: splitting, merging, resharding, direct loading and
verification are all that intersection (`plan.py`), and nothing else knows where a row goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ParallelLayout

Box = tuple[tuple[int, int], ...]
"""(start, stop) on each of a view's three axes."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
VOCABULARY = (EMBEDDING, OUTPUT)

BY_BLOCKS, BY_ROWS, BY_COLUMNS = 0, 1, 2


class TensorSlice(NamedTuple):
    """One stored tensor: which box of which whole-model tensor it is, and the shape it has."""

    tensor: str
    """The whole-model Megatron name (layer numbers count over all stages)."""
    box: Box
    shape: tuple[int, ...]


class Shard(NamedTuple):
    """One model chunk of one rank: a file's worth of tensors (or part of one, with VPP)."""

    tp_rank: int
    pp_stage: int
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of tensor; `{}` in the names is the layer number."""

    megatron: str
    parts: tuple[tuple[str, Box], ...]
    """Hugging Face names with the box each fills."""
    view: tuple[int, int, int]
    shard_axis: int | None = None
    """BY_BLOCKS, BY_ROWS, BY_COLUMNS, or None where every rank holds all of it."""

    @property
    def is_of_layer(self) -> bool:
        """Whether every layer has one."""
        return "{}" in self.megatron

    @property
    def is_matrix(self) -> bool:
        return not (self.megatron.endswith("bias") or "layernorm" in self.megatron)

    def shape(self, box: Box) -> tuple[int, ...]:
        """The stored shape of `box`: `[blocks * rows, columns]`, or one axis for vectors."""
        blocks, rows, columns = (stop - start for start, stop in box)
        return (blocks * rows, columns) if self.is_matrix else (blocks * rows,)

    def piece(self, box: Box, layer: int | None = None) -> TensorSlice:
        """`box` of a layer's tensor, or of the model's only one, as it is stored."""
        return TensorSlice(self.megatron.format(layer), box, self.shape(box))

    @property
    def whole(self) -> Box:
        """The box of all of it."""
        return tuple((0, n) for n in self.view)

    def shard(self, tp: int, tp_rank: int) -> Box:
        """The box that one of `tp` ranks holds."""
        if self.shard_axis is None:
            return self.whole
        if self.shard_axis == BY_BLOCKS:
            rows = self.view[0] * self.view[1] // tp
            return self.rows_box(tp_rank * rows, (tp_rank + 1) * rows)
        box, n = list(self.whole), self.view[self.shard_axis] // tp
        box[self.shard_axis] = (tp_rank * n, (tp_rank + 1) * n)
        return tuple(box)

    def rows_box(self, start: int, stop: int) -> Box:
        """The box of stored rows start..stop, which must be whole blocks or lie inside one.

        Raises:
            ValueError: the rows end in the middle of another block, which no layout does.
        """
        _, rows, columns = self.view
        if start % rows == 0 and stop % rows == 0:
            return ((start // rows, stop // rows), (0, rows), (0, columns))
        block = start // rows
        if stop > (block + 1) * rows:
            raise ValueError(f"{self.megatron}: rows {start}..{stop} straddle blocks of {rows}")
        inside = (start - block * rows, stop - block * rows)
        return ((block, block + 1), inside, (0, columns))


def qwen2_rules(config: Qwen2Config, padded_vocab_size: int | None = None) -> tuple[Rule, ...]:
    """All of Qwen2: the embedding, a layer's rules, the final norm, and the output if untied."""
    h, f = config.hidden_size, config.ffn_hidden_size
    heads = config.num_attention_heads * config.kv_channels
    vocabulary = config.vocab_size if padded_vocab_size is None else padded_vocab_size
    rules = [
        _vocabulary(EMBEDDING, "model.embed_tokens.weight", config, vocabulary),
        _norm("decoder.layers.{}.input_layernorm.weight", "input_layernorm.weight", h),
        _qkv("weight", config, columns=h),
        _qkv("bias", config, columns=1),
        _columns("self_attention.linear_proj", "self_attn.o_proj", h, heads),
        _norm("decoder.layers.{}.pre_mlp_layernorm.weight", "post_attention_layernorm.weight", h),
        Rule(
            megatron="decoder.layers.{}.mlp.linear_fc1.weight",
            parts=(
                ("model.layers.{}.mlp.gate_proj.weight", ((0, 1), (0, f), (0, h))),
                ("model.layers.{}.mlp.up_proj.weight", ((1, 2), (0, f), (0, h))),
            ),
            view=(2, f, h),
            shard_axis=BY_ROWS,
        ),
        _columns("mlp.linear_fc2", "mlp.down_proj", h, f),
        _norm(FINAL_NORM, "model.norm.weight", h),
    ]
    if not config.tie_word_embeddings:
        rules.append(_vocabulary(OUTPUT, "lm_head.weight", config, vocabulary))
    return tuple(rules)


def hugging_face_pieces(config: Qwen2Config) -> dict[str, TensorSlice]:
    """Every tensor of the Hugging Face model by name, in the order of the model."""
    return {
        name.format(layer): rule.piece(box, layer)
        for rule, layer in _whole_model(config, qwen2_rules(config))
        for name, box in rule.parts
    }


def megatron_pieces(
    config: Qwen2Config, layout: ParallelLayout, padded_vocab_size: int
) -> dict[Shard, dict[str, TensorSlice]]:
    """Every rank's tensors under their Megatron names, layers numbered within the chunk.

    With tied embeddings and more than one stage the last stage holds the embedding a second time,
    as `output_layer.weight`, as Megatron does.
    """
    rules = qwen2_rules(config, padded_vocab_size)
    of_layer = [rule for rule in rules if rule.is_of_layer]
    outer = {rule.megatron: rule for rule in rules if not rule.is_of_layer}
    if layout.pp > 1:
        outer.setdefault(OUTPUT, outer[EMBEDDING])
    stages = layout.stages(config.num_layers)
    last = (layout.pp - 1, len(stages[-1]) - 1)
    found: dict[Shard, dict[str, TensorSlice]] = {}
    for tp_rank in range(layout.tp):
        boxes = {rule: rule.shard(layout.tp, tp_rank) for rule in rules}
        ends = {name: rule.piece(boxes[rule]) for name, rule in outer.items()}
        for stage, chunks in enumerate(stages):
            for chunk, layers in enumerate(chunks):
                pieces = found[Shard(tp_rank, stage, chunk)] = {}
                if (stage, chunk) == (0, 0):
                    pieces[EMBEDDING] = ends[EMBEDDING]
                for local, layer in enumerate(layers):
                    for rule in of_layer:
                        pieces[rule.megatron.format(local)] = rule.piece(boxes[rule], layer)
                if (stage, chunk) == last:
                    pieces |= {name: ends[name] for name in (FINAL_NORM, OUTPUT) if name in ends}
    return found


def _whole_model(config: Qwen2Config, rules: tuple[Rule, ...]):
    """(rule, layer number) of every tensor, in the order of the model."""
    per_layer = [rule for rule in rules if rule.is_of_layer]
    yield rules[0], 0
    for layer in range(config.num_layers):
        yield from ((rule, layer) for rule in per_layer)
    yield from ((rule, 0) for rule in rules[1:] if rule not in per_layer)


def _box(view: tuple[int, int, int]) -> Box:
    return tuple((0, n) for n in view)


def _vocabulary(megatron: str, name: str, config: Qwen2Config, padded: int) -> Rule:
    real = _box((1, config.vocab_size, config.hidden_size))
    view = (1, padded, config.hidden_size)
    return Rule(megatron=megatron, parts=((name, real),), view=view, shard_axis=BY_ROWS)


def _norm(megatron: str, name: str, h: int) -> Rule:
    if "{}" in megatron:
        name = f"model.layers.{{}}.{name}"
    return Rule(megatron=megatron, parts=((name, _box((1, h, 1))),), view=(1, h, 1))


def _qkv(kind: str, config: Qwen2Config, *, columns: int) -> Rule:
    ng, hn = config.num_query_groups, config.kv_channels
    q = config.heads_per_group * hn
    ends = {"q_proj": (0, q), "k_proj": (q, q + hn), "v_proj": (q + hn, q + 2 * hn)}
    return Rule(
        megatron=f"decoder.layers.{{}}.self_attention.linear_qkv.{kind}",
        parts=tuple(
            (f"model.layers.{{}}.self_attn.{name}.{kind}", ((0, ng), rows, (0, columns)))
            for name, rows in ends.items()
        ),
        view=(ng, q + 2 * hn, columns),
        shard_axis=BY_BLOCKS,
    )


def _columns(megatron: str, name: str, rows: int, columns: int) -> Rule:
    view = (1, rows, columns)
    return Rule(
        megatron=f"decoder.layers.{{}}.{megatron}.weight",
        parts=((f"model.layers.{{}}.{name}.weight", _box(view)),),
        view=view,
        shard_axis=BY_COLUMNS,
    )
