// A whole decoder layer at once: for a few tokens the time between two calls is as long as the shorter operations.
#pragma once

#include "meet.h"
#include "pointwise.h"

static void project(const Projection& p, const float* x, float* out, int rows) {
    const auto quantized_as = [&](auto* const* matrices) {
        quantized::linear(matrices, p.count, x, rows, p.bias, out);
    };
    if (p.kind == QUANTIZED) return quantized_as((const quantized::Matrix* const*)p.weight);
    if (p.kind == NF4) return quantized_as((const quantized::Nf4Matrix* const*)p.weight);
    linear({x, p.weight, p.bias, out, rows, p.inputs, p.outputs}, p.kind);
}

constexpr int ADAPTED = 4;  // A layer has so many linears that adapters add to: qkv, out, gate_up and down.

// What adapters add to several linears: the addresses for one linear [uses.count] follow those for the one before.
struct Adapted {
    const low_rank::Adapter* const* adapters;
    low_rank::Rows uses;
};

static void project(const Projection& p, const Adapted& adapted, int place, const float* x, float* out, int rows) {
    project(p, x, out, rows);
    low_rank::add({x, out, adapted.uses, rows, p.inputs, p.outputs},
                  adapted.adapters + size_t(place) * adapted.uses.count);
}

// x [T, hidden] is what the layer adds to; `count` is T. Of several ranks each has some of the heads and columns, and all
// have what these make, gathered, before the next product.
static void decoder_layer(const DecoderLayer& layer, const Cache& cache, const Rope& rope, const Step& step,
                          const Adapted& adapted, float* x, int count) {
    const int hidden = layer.qkv.inputs, middle = layer.gate_up.outputs / 2;
    const int width = layer.qkv.outputs, dims = cache.dims, kv_heads = cache.kv_heads;
    const size_t attended_floats = size_t(count) * layer.heads * dims;
    const size_t whole = layer.split ? size_t(count) * std::max({hidden, layer.out.inputs, layer.down.inputs}) : 0;
    static thread_local Scratch memory;
    float* const normed = memory.floats(count * (size_t(2) * hidden + width + 3 * middle) + 2 * attended_floats + whole);
    float* const y = normed + size_t(count) * hidden;
    float* const qkv = y + size_t(count) * hidden;
    float* const rotated = qkv + size_t(count) * width;
    float* const attended = rotated + attended_floats;
    float* const gate_up = attended + attended_floats;
    float* const gates = gate_up + size_t(count) * 2 * middle;
    float* const gathered = gates + size_t(count) * middle;

    const auto norm_of = [&](const Norm& norm, const float* from, float* to) -> const float* {
        if (!norm.weight) return from;
        rms_norm(from, hidden, norm.weight, to, count, hidden, norm.eps);
        return to;
    };
    const auto add = [&](const float* more) {
        for (size_t i = 0; i < size_t(count) * hidden; ++i) x[i] += more[i];
    };
    // What all ranks have made, of which `mine` is this rank's.
    const auto all_of = [&](const float* mine, const int32_t* Split::*sizes) -> const float* {
        if (!layer.split || !(layer.split->*sizes)) return mine;  // Each rank has all columns where these are few.
        meet::gather(*layer.split->ranks, (const uint8_t*)mine, layer.split->*sizes, count, (uint8_t*)gathered);
        return gathered;
    };
    project(layer.qkv, adapted, 0, norm_of(layer.before_attention, x, normed), qkv, count);
    float* const keys = qkv + layer.heads * dims;
    for (int t = 0; t < count; ++t) {
        const size_t at = size_t(t) * width;
        const Norm &q = layer.of_queries, &k = layer.of_keys;
        if (q.weight) rms_norm(qkv + at, dims, q.weight, qkv + at, layer.heads, dims, q.eps);
        if (k.weight) rms_norm(keys + at, dims, k.weight, keys + at, kv_heads, dims, k.eps);
    }
    store_kv(cache, keys, width, keys + kv_heads * dims, width, step.slots, count);
    if (rope.half) {
        rotate(qkv, width, rotated, rope, step, count, layer.heads, dims);
    } else {
        for (int t = 0; t < count; ++t)
            std::copy_n(qkv + size_t(t) * width, layer.heads * dims, rotated + size_t(t) * layer.heads * dims);
    }
    attention({rotated, attended, layer.heads, layer.window, layer.scale, layer.softcap, cache, rope, step});
    project(layer.out, adapted, 1, all_of(attended, &Split::attended), y, count);
    add(norm_of(layer.after_attention, all_of(y, &Split::out), normed));
    project(layer.gate_up, adapted, 2, norm_of(layer.before_mlp, x, normed), gate_up, count);
    gated(layer.activation, gate_up, gates, count, middle);
    project(layer.down, adapted, 3, all_of(gates, &Split::middle), y, count);
    add(norm_of(layer.after_mlp, all_of(y, &Split::down), normed));
}
