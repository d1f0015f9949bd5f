// A whole decoder layer in one call: for a few tokens the time between two operations is as long as the shorter ones.
#pragma once

#include "linear.h"
#include "low_rank.h"
#include "nf4.h"
#include "pointwise.h"
#include "step.h"

// native_structs.py has the same fields in these three.
struct Projection {
    const void* weight;  // of quantized ones `count` addresses
    const float* bias;   // or null
    int32_t kind, count, inputs, outputs;
};
struct Norm {
    const float* weight;  // null: there is none
    float eps;
};
struct DecoderLayer {
    Projection qkv, out, gate_up, down;
    Norm before_attention, after_attention, before_mlp, after_mlp, of_queries, of_keys;
    int32_t heads, window, activation;
    float scale, softcap;
};

enum Kind { PLAIN_FLOAT32, PLAIN_BFLOAT16, PLAIN_FLOAT16, QUANTIZED, NF4 };

// What of a step the layers need beside its attention.
struct Tokens {
    const int64_t* slots;
    const int32_t *positions, *sequence_of;
    const float* query_scale;
    int count;
};

static void project(const Projection& p, const float* x, float* out, int rows) {
    const Linear l{x, p.weight, p.bias, out, rows, p.inputs, p.outputs};
    if (p.kind == PLAIN_FLOAT32) linear<float>(l);
    if (p.kind == PLAIN_BFLOAT16) linear<bf16>(l);
    if (p.kind == PLAIN_FLOAT16) linear<f16>(l);
    const auto quantized_as = [&](auto* const* matrices) {
        quantized::linear(matrices, p.count, x, rows, p.bias, out);
    };
    if (p.kind == QUANTIZED) quantized_as((const quantized::Matrix* const*)p.weight);
    if (p.kind == NF4) quantized_as((const quantized::Nf4Matrix* const*)p.weight);
}

// And what adapters add to the outputs: those of the `place`th of the linears that `rows` tells of.
static void project(const Projection& p, const low_rank::Rows& rows, int place, const float* x, float* out, int count) {
    project(p, x, out, count);
    low_rank::add({x, out, rows.slots, rows.scales, count, p.inputs, p.outputs},
                  rows.adapters + size_t(place) * rows.count, rows.count);
}

static void gated(int activation, const float* gate_up, float* out, int rows, int width) {
    if (activation == SILU) gated<SILU>(gate_up, out, rows, width);
    if (activation == GELU) gated<GELU>(gate_up, out, rows, width);
    if (activation == GELU_TANH) gated<GELU_TANH>(gate_up, out, rows, width);
}

static void attention(const Attention& a) {
    if (a.cache.format == F16) attention<F16>(a);
    if (a.cache.format == Q8) attention<Q8>(a);
    if (a.cache.format == Q4) attention<Q4>(a);
}

// `a` comes without queries and output. x [T, hidden] is what the layer adds to. `adapted` tells of qkv, out, gate_up and
// down.
static void decoder_layer(const DecoderLayer& layer, Attention a, const Tokens& tokens, const low_rank::Rows& adapted,
                          float* x) {
    const int count = tokens.count, hidden = layer.qkv.inputs, middle = layer.down.inputs;
    const int width = layer.qkv.outputs, dims = a.cache.dims, kv_heads = a.cache.kv_heads;
    const size_t attended_floats = size_t(count) * layer.heads * dims;
    static thread_local Scratch memory;
    float* const normed = memory.floats(count * (size_t(2) * hidden + width + 3 * middle) + 2 * attended_floats);
    float* const y = normed + size_t(count) * hidden;
    float* const qkv = y + size_t(count) * hidden;
    float* const rotated = qkv + size_t(count) * width;
    float* const attended = rotated + attended_floats;
    float* const gate_up = attended + attended_floats;
    float* const gates = gate_up + size_t(count) * 2 * middle;

    const auto norm_of = [&](const Norm& norm, const float* from, float* to) -> const float* {
        if (!norm.weight) return from;
        rms_norm(from, hidden, norm.weight, to, count, hidden, norm.eps);
        return to;
    };
    const auto add = [&](const float* more) {
        for (size_t i = 0; i < size_t(count) * hidden; ++i) x[i] += more[i];
    };
    project(layer.qkv, adapted, 0, norm_of(layer.before_attention, x, normed), qkv, count);
    float* const keys = qkv + layer.heads * dims;
    for (int t = 0; t < count; ++t) {
        const size_t at = size_t(t) * width;
        const Norm &q = layer.of_queries, &k = layer.of_keys;
        if (q.weight) rms_norm(qkv + at, dims, q.weight, qkv + at, layer.heads, dims, q.eps);
        if (k.weight) rms_norm(keys + at, dims, k.weight, keys + at, kv_heads, dims, k.eps);
    }
    store_kv(a.cache, keys, width, keys + kv_heads * dims, width, tokens.slots, count);
    if (a.rope.half) {
        rotate(qkv, width, rotated, a.rope, tokens.query_scale, tokens.positions, tokens.sequence_of, count,
               layer.heads, dims);
    } else {
        for (int t = 0; t < count; ++t)
            std::copy_n(qkv + size_t(t) * width, layer.heads * dims, rotated + size_t(t) * layer.heads * dims);
    }
    a.queries = rotated;
    a.out = attended;
    attention(a);
    project(layer.out, adapted, 1, attended, y, count);
    add(norm_of(layer.after_attention, y, normed));
    project(layer.gate_up, adapted, 2, norm_of(layer.before_mlp, x, normed), gate_up, count);
    gated(layer.activation, gate_up, gates, count, middle);
    project(layer.down, adapted, 3, gates, y, count);
    add(norm_of(layer.after_mlp, y, normed));
}
