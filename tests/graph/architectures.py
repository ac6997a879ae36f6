"""Small random models in the forms that real exporters write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from tests.graph.net import HEAD, HEADS, LAYERS, VOCABULARY, WIDTH, Net

SEQ = 6


def _tokens(net: Net, scale: bool = False) -> tuple[ir.Value, ir.Value]:
    ids = net.input("ids", ["batch", SEQ], ir.DataType.INT64)
    table = net.random(VOCABULARY, WIDTH, name="embedding.weight")
    x = net.op("Gather", table, ids)
    return table, net.op("Mul", x, net.const(np.float32(WIDTH**0.5))) if scale else x


def gpt2(*, tied: bool = False) -> ir.Model:
    """Pre-LN decoder: learned positions, fused q/k/v through Split, GELU; the tokens' table is the head if tied."""
    net = Net(1)
    table, x = _tokens(net)
    x = net.op("Add", x, net.random(1, SEQ, WIDTH))
    for _ in range(LAYERS):
        qkv = net.op("Split", net.linear(net.layer_norm(x), WIDTH, 3 * WIDTH), outputs=3, axis=-1, num_outputs=3)
        mixed = net.attention(*(net.heads(v, HEADS) for v in qkv))
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH))
        x = net.op("Add", x, net.linear(net.gelu(net.linear(net.layer_norm(x), WIDTH, 24)), 24, WIDTH))
    h = net.layer_norm(x)
    if tied:
        return net.model(net.op("MatMul", h, net.op("Transpose", table, perm=[1, 0])))
    return net.model(net.linear(h, WIDTH, VOCABULARY, bias=False))


def opt() -> ir.Model:
    """OPT: separate q, k and v, ReLU."""
    net = Net(2)
    _, x = _tokens(net)
    for _ in range(LAYERS):
        h = net.layer_norm(x)
        mixed = net.attention(*(net.heads(net.linear(h, WIDTH, WIDTH), HEADS) for _ in range(3)))
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH))
        x = net.op("Add", x, net.linear(net.op("Relu", net.linear(net.layer_norm(x), WIDTH, 24)), 24, WIDTH))
    return net.model(net.linear(net.layer_norm(x), WIDTH, VOCABULARY, bias=False))


def llama(kv: int = HEADS, *, interleaved: bool = False, seed: int = 3) -> ir.Model:
    """Llama: decomposed RMSNorm and rotary embedding, gated MLP; grouped heads where kv < HEADS."""
    return _llama(Net(seed), kv, interleaved=interleaved)


def qwen() -> ir.Model:
    """Qwen: biases on q, k and v, norms of queries and keys."""
    return _llama(Net(4), 2, bias=True, head_norms=True)


def gemma() -> ir.Model:
    """Gemma: 1 + gamma, embeddings times sqrt(d), tied head."""
    return _llama(Net(5), 2, plus_one=True, tied=True)


def _llama(
    net: Net, kv: int, *, bias: bool = False, head_norms: bool = False, plus_one: bool = False,
    tied: bool = False, interleaved: bool = False,
) -> ir.Model:  # fmt: skip
    table, x = _tokens(net, scale=tied)
    for layer in range(LAYERS):
        h = net.rms_norm(x, plus_one=plus_one)
        sizes = {"q": HEADS, "k": kv, "v": kv}
        parts = {n: net.heads(net.linear(h, WIDTH, c * HEAD, bias, f"{layer}.{n}"), c) for n, c in sizes.items()}
        for name in ("q", "k"):
            if head_norms:
                parts[name] = net.rms_norm(parts[name], HEAD)
            parts[name] = net.rotate(parts[name], SEQ, interleaved)
        if kv < HEADS:
            parts |= {n: net.repeat(parts[n], kv, HEADS // kv) for n in ("k", "v")}
        mixed = net.attention(parts["q"], parts["k"], parts["v"])
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH, False, f"{layer}.o"))
        h = net.rms_norm(x, plus_one=plus_one)
        gate, up = (net.linear(h, WIDTH, 24, False, f"{layer}.{n}") for n in ("gate", "up"))
        x = net.op("Add", x, net.linear(net.op("Mul", net.silu(gate), up), 24, WIDTH, False, f"{layer}.down"))
    h = net.rms_norm(x, plus_one=plus_one)
    if tied:
        return net.model(net.op("MatMul", h, net.op("Transpose", table, perm=[1, 0])))
    return net.model(net.linear(h, WIDTH, VOCABULARY, False, "head"))


def llama_fused(kv: int = 2) -> ir.Model:
    """Llama with the operators of opset 23: RMSNormalization, RotaryEmbedding, Attention."""
    net = Net(6, opset=23)
    _, x = _tokens(net)
    cos, sin = (net.const(f(np.outer(np.arange(SEQ), [1.0, 0.1]))[None]) for f in (np.cos, np.sin))
    for layer in range(LAYERS):
        h = net.op("RMSNormalization", x, net.gain(WIDTH), axis=-1, epsilon=1e-6)
        q, k, v = (
            net.linear(h, WIDTH, c * HEAD, False, f"{layer}.{n}") for n, c in (("q", HEADS), ("k", kv), ("v", kv))
        )
        q = net.op("RotaryEmbedding", q, _batch(net, cos, q), _batch(net, sin, q), num_heads=HEADS)
        k = net.op("RotaryEmbedding", k, _batch(net, cos, k), _batch(net, sin, k), num_heads=kv)
        mixed = net.op("Attention", q, k, v, q_num_heads=HEADS, kv_num_heads=kv)
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH, False, f"{layer}.o"))
        h = net.op("RMSNormalization", x, net.gain(WIDTH), axis=-1, epsilon=1e-6)
        gate, up = (net.linear(h, WIDTH, 24, False, f"{layer}.{n}") for n in ("gate", "up"))
        x = net.op("Add", x, net.linear(net.op("Mul", net.silu(gate), up), 24, WIDTH, False, f"{layer}.down"))
    h = net.op("RMSNormalization", x, net.gain(WIDTH), axis=-1, epsilon=1e-6)
    return net.model(net.linear(h, WIDTH, VOCABULARY, False, "head"))


def _batch(net: Net, table: ir.Value, like: ir.Value) -> ir.Value:
    batch = net.op("Shape", like, start=0, end=1)
    return net.op("Expand", table, net.op("Concat", batch, net.ints(SEQ, HEAD // 2), axis=0))


def parallel() -> ir.Model:
    """NeoX and Phi: one norm feeds attention and MLP."""
    net = Net(7)
    _, x = _tokens(net)
    for _ in range(LAYERS):
        h = net.layer_norm(x)
        mixed = net.attention(*(net.heads(net.linear(h, WIDTH, WIDTH), HEADS) for _ in range(3)))
        mlp = net.linear(net.gelu(net.linear(h, WIDTH, 24)), 24, WIDTH)
        x = net.op("Add", x, net.op("Add", net.linear(mixed, WIDTH, WIDTH), mlp))
    return net.model(net.linear(net.layer_norm(x), WIDTH, VOCABULARY, bias=False))


def vit() -> ir.Model:
    """Vision transformer: patches by a convolution, class token by Concat, head on token 0."""
    net = Net(8)
    image = net.input("images", ["batch", 3, 8, 8])
    patches = net.op("Conv", image, net.random(WIDTH, 3, 4, 4), net.random(WIDTH), strides=[4, 4])
    x = net.op("Transpose", net.op("Reshape", patches, net.ints(0, WIDTH, -1)), perm=[0, 2, 1])
    batch = net.op("Shape", image, start=0, end=1)
    token = net.op("Expand", net.random(1, 1, WIDTH), net.op("Concat", batch, net.ints(1, WIDTH), axis=0))
    x = net.op("Add", net.op("Concat", token, x, axis=1), net.random(1, 5, WIDTH))
    for _ in range(LAYERS):
        h = net.layer_norm(x)
        mixed = net.attention(*(net.heads(net.linear(h, WIDTH, WIDTH), HEADS) for _ in range(3)))
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH))
        x = net.op("Add", x, net.linear(net.gelu(net.linear(net.layer_norm(x), WIDTH, 24)), 24, WIDTH))
    first = net.op("Gather", net.layer_norm(x), net.const(np.array(0)), axis=1)
    return net.model(net.op("Gemm", first, net.random(10, WIDTH), net.random(10), transB=1))


EXPERTS = 4


def moe(*, stacked: bool = False) -> ir.Model:
    """Mixtral: a router sends every token to the two best of its experts; their weights are one tensor if stacked."""
    net = Net(12)
    _, x = _tokens(net)
    for layer in range(LAYERS):
        h = net.rms_norm(x)
        mixed = net.attention(*(net.heads(net.linear(h, WIDTH, WIDTH, False), HEADS) for _ in range(3)))
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH, False))
        h = net.rms_norm(x)
        chances = net.op("Softmax", net.linear(h, WIDTH, EXPERTS, False, f"{layer}.router"), axis=-1)
        best, chosen = net.op("TopK", chances, net.ints(2), outputs=2, axis=-1)
        shares = [_share(net, best, chosen, expert) for expert in range(EXPERTS)]
        x = net.op("Add", x, _stacked(net, h, shares) if stacked else _experts(net, h, shares))
    return net.model(net.linear(net.rms_norm(x), WIDTH, VOCABULARY, False))


def _share(net: Net, best: ir.Value, chosen: ir.Value, expert: int) -> ir.Value:
    """[batch, seq, 1]: with what weight an expert takes part, 0 for most."""
    mine = net.op("Equal", chosen, net.const(np.array(expert, np.int64)))
    return net.op("ReduceSum", net.op("Where", mine, best, net.const(np.float32(0))), net.ints(-1))


def _experts(net: Net, h: ir.Value, shares: Sequence[ir.Value]) -> ir.Value:
    total: ir.Value | None = None
    for share in shares:
        gate, up = (net.linear(h, WIDTH, 12, False) for _ in range(2))
        y = net.op("Mul", net.linear(net.op("Mul", net.silu(gate), up), 12, WIDTH, False), share)
        total = y if total is None else net.op("Add", total, y)
    assert total is not None
    return total


def _stacked(net: Net, h: ir.Value, shares: Sequence[ir.Value]) -> ir.Value:
    wide = net.op("Unsqueeze", h, net.ints(1))
    gate, up, down = (
        net.const(net.rng.normal(size=(EXPERTS, *shape)) / np.sqrt(shape[0]))
        for shape in ((WIDTH, 12), (WIDTH, 12), (12, WIDTH))
    )
    inside = net.op("Mul", net.silu(net.op("MatMul", wide, gate)), net.op("MatMul", wide, up))
    weights = net.op("Concat", *(net.op("Unsqueeze", share, net.ints(1)) for share in shares), axis=1)
    return net.op("ReduceSum", net.op("Mul", net.op("MatMul", inside, down), weights), net.ints(1), keepdims=0)


def packed() -> ir.Model:
    """timm's attention: queries, keys and values in one axis of a reshaped product; both of q and k are scaled."""
    net = Net(13)
    _, x = _tokens(net)
    for _ in range(LAYERS):
        joined = net.op("Reshape", net.linear(net.layer_norm(x), WIDTH, 3 * WIDTH), net.ints(0, 0, 3, HEADS, HEAD))
        apart = net.op("Transpose", joined, perm=[2, 0, 3, 1, 4])
        q, k, v = (net.op("Gather", apart, net.const(np.array(n)), axis=0) for n in range(3))
        q, k = (net.op("Mul", part, net.const(np.float32(HEAD**-0.25))) for part in (q, k))
        x = net.op("Add", x, net.linear(net.attention(q, k, v), WIDTH, WIDTH))
        x = net.op("Add", x, net.linear(net.op("Gelu", net.linear(net.layer_norm(x), WIDTH, 24)), 24, WIDTH))
    return net.model(net.linear(net.op("ReduceMean", net.layer_norm(x), net.ints(1), keepdims=0), WIDTH, 10))


def merged() -> ir.Model:
    """Heads in the batch axis, as older exports of OPT have it, and a mask by Where; Gemm on flattened tokens."""
    net = Net(14)
    _, x = _tokens(net)
    mask = net.const(np.tril(np.ones((SEQ, SEQ), np.bool_)))
    for _ in range(LAYERS):
        h = net.layer_norm(x)
        parts = [net.heads(net.linear(h, WIDTH, WIDTH), HEADS) for _ in range(3)]
        q, k, v = (net.op("Reshape", part, net.ints(-1, SEQ, HEAD)) for part in parts)
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
        scores = net.op("Where", mask, scores, net.const(np.float32(-1e9)))
        mixed = net.op(
            "Reshape", net.op("MatMul", net.op("Softmax", scores, axis=-1), v), net.ints(-1, HEADS, SEQ, HEAD)
        )
        mixed = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(-1, SEQ, WIDTH))
        x = net.op("Add", x, net.linear(mixed, WIDTH, WIDTH))
        flat = net.op("Reshape", net.layer_norm(x), net.ints(-1, WIDTH))
        inside = net.op("Relu", net.op("Gemm", flat, net.random(24, WIDTH), net.random(24), transB=1))
        out = net.op("Gemm", inside, net.random(WIDTH, 24), net.random(WIDTH), transB=1)
        x = net.op("Add", x, net.op("Reshape", out, net.ints(-1, SEQ, WIDTH)))
    return net.model(net.linear(net.layer_norm(x), WIDTH, VOCABULARY, bias=False))


def bert() -> ir.Model:
    """Norms behind the sums: BERT and the original transformer."""
    net = Net(11)
    _, x = _tokens(net)
    x = net.layer_norm(net.op("Add", x, net.random(1, SEQ, WIDTH)))
    for _ in range(LAYERS):
        mixed = net.attention(*(net.heads(net.linear(x, WIDTH, WIDTH), HEADS) for _ in range(3)))
        x = net.layer_norm(net.op("Add", x, net.linear(mixed, WIDTH, WIDTH)))
        x = net.layer_norm(net.op("Add", x, net.linear(net.gelu(net.linear(x, WIDTH, 24)), 24, WIDTH)))
    return net.model(net.linear(x, WIDTH, 10))


def mobilenet(clip: bool = True) -> ir.Model:
    """Inverted residuals: 1x1, depthwise, 1x1, with ReLU6 (or ReLU)."""
    net = Net(9)
    image = net.input("images", ["batch", 3, 12, 12])

    def relu6(x: ir.Value) -> ir.Value:
        if not clip:
            return net.op("Relu", x)
        return net.op("Clip", x, net.const(np.float32(0)), net.const(np.float32(6)))

    x = relu6(net.conv(image, 3, 8, strides=[2, 2]))
    for _ in range(LAYERS):
        h = relu6(net.conv(x, 8, 16, 1))
        h = relu6(net.conv(h, 16, 16, 3, groups=16))
        x = net.op("Add", x, net.conv(h, 16, 8, 1))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", relu6(net.conv(x, 8, 20, 1))))
    return net.model(net.op("Gemm", pooled, net.random(10, 20), net.random(10), transB=1))


def efficientnet() -> ir.Model:
    """EfficientNet-Lite: bottlenecks without activation behind them, 5x5 kernels, no squeeze and excitation."""
    net = Net(15)
    image = net.input("images", ["batch", 3, 12, 12])

    def relu6(x: ir.Value) -> ir.Value:
        return net.op("Clip", x, net.const(np.float32(0)), net.const(np.float32(6)))

    x = relu6(net.conv(image, 3, 8, strides=[2, 2]))
    x = net.conv(relu6(net.conv(x, 8, 8, 3, groups=8)), 8, 6, 1)
    for _ in range(LAYERS):
        h = relu6(net.conv(relu6(net.conv(x, 6, 24, 1)), 24, 24, 5, groups=24))
        x = net.op("Add", net.conv(h, 24, 6, 1), x)
    h = relu6(net.conv(relu6(net.conv(x, 6, 24, 1)), 24, 24, 5, groups=24, strides=[2, 2]))
    x = relu6(net.conv(net.conv(h, 24, 10, 1), 10, 20, 1))
    pooled = net.op("Flatten", net.op("AveragePool", x, kernel_shape=[3, 3]))
    return net.model(net.op("Gemm", pooled, net.random(10, 20), net.random(10), transB=1))


def resnet() -> ir.Model:
    """Residual blocks with ReLU after the sum, a projection shortcut, a grouped convolution and PRelu."""
    net = Net(10)
    image = net.input("images", ["batch", 3, 12, 12])
    x = net.op("MaxPool", net.op("Relu", net.conv(image, 3, 8)), kernel_shape=[2, 2], strides=[2, 2])
    h = net.conv(net.op("Relu", net.conv(x, 8, 8)), 8, 8)
    x = net.op("Relu", net.op("Add", x, h))
    h = net.op("PRelu", net.conv(x, 8, 16, strides=[2, 2]), net.const(net.rng.uniform(0.1, 0.3, (16, 1, 1))))
    h = net.conv(net.op("LeakyRelu", net.conv(h, 16, 16, groups=4), alpha=0.1), 16, 16)
    x = net.op("Relu", net.op("Add", net.conv(x, 8, 16, 1, strides=[2, 2]), h))
    flat = net.op("Reshape", net.op("ReduceMean", x, net.ints(2, 3)), net.ints(0, 16))
    return net.model(net.op("Gemm", flat, net.random(16, 10), net.random(10)))


ARCHITECTURES: dict[str, Callable[[], ir.Model]] = {
    "gpt2": gpt2,
    "gpt2-tied": lambda: gpt2(tied=True),
    "opt": opt,
    "llama": llama,
    "llama-gqa": lambda: llama(2),
    "llama-interleaved": lambda: llama(2, interleaved=True),
    "llama-fused": llama_fused,
    "qwen": qwen,
    "gemma": gemma,
    "parallel": parallel,
    "vit": vit,
    "bert": bert,
    "moe": moe,
    "moe-stacked": lambda: moe(stacked=True),
    "packed": packed,
    "merged": merged,
    "efficientnet": efficientnet,
    "mobilenet": mobilenet,
    "mobilenet-relu": lambda: mobilenet(clip=False),
    "resnet": resnet,
}


def feeds_for(model: ir.Model, seed: int = 0, batch: int = 3, loud: bool = False) -> dict[str, np.ndarray]:
    """Random inputs; with `loud` one channel of float inputs is a hundred times larger."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else batch for d in value.shape or ()]
        if value.dtype == ir.DataType.INT64:
            feeds[value.name or ""] = rng.integers(0, VOCABULARY, shape)
        else:
            array = rng.normal(size=shape).astype(np.float32)
            if loud:
                array[:, 0] *= 100
            feeds[value.name or ""] = array
    return feeds


def inject_outliers(model: ir.Model, count: int = 3, factor: float = 100.0) -> None:
    """Make some channels of the embedding table large, in place: the whole residual stream has outliers then."""
    rng = np.random.default_rng(0)
    value = model.graph.initializers.get("embedding.weight")
    if value is not None and value.const_value is not None:
        array = value.const_value.numpy().copy()
        array[:, rng.choice(WIDTH, count, replace=False)] *= factor
        value.const_value = ir.tensor(array, name=value.name)
