// What the library's units, one .cpp each, ask of each other.
#pragma once

#include <algorithm>

#include "structs.h"

// In front of what native.py calls. There, pointers are to contiguous memory unless a stride, in floats, says how far
// apart tokens are; shapes and meanings are those of kernels/reference.py.
#define EXPORT extern "C" __attribute__((visibility("default")))

// A step's attention: queries [T, H, D] to out [T, H, D]. Without a window or a softcap these are 0.
struct Attention {
    const float* queries;
    float* out;
    int heads, window;
    float scale, softcap;
    Cache cache;
    Rope rope;
    Step step;

    int group() const { return heads / cache.kv_heads; }
    const int32_t* pages(int b) const { return step.block_tables + size_t(b) * step.block_table_width; }
    const float* page_angles(int b, int index) const {
        return rope.pages + (size_t(rope.set_of[b]) * rope.num_pages + index) * 2 * rope.half;
    }
    const float* place_angles(int b) const { return rope.places + size_t(rope.set_of[b]) * PAGE * 2 * rope.half; }
    int first_seen(int position) const { return window ? std::max(0, position - window + 1) : 0; }
};

// keys and values [T, Hkv, D], tokens `stride` floats apart, into slots [T].
void store_kv(const Cache& c, const float* keys, size_t key_stride, const float* values, size_t value_stride,
              const int64_t* slots, int tokens);
void attention(const Attention& a);

// x [rows, inputs] to out [rows, outputs].
struct Linear {
    const float* x;
    const void* weight;
    const float* bias;  // null, or [outputs]
    float* out;
    int rows, inputs, outputs;
};
void linear(const Linear& l, int dtype);

namespace low_rank {

// x [rows, inputs], by which out [rows, outputs] grows.
struct Addition {
    const float* x;
    float* out;
    Rows uses;
    int rows, inputs, outputs;
};
// Of the adapters in use [uses.count] those are null that add nothing to this linear.
void add(const Addition& a, const Adapter* const* adapters);

}  // namespace low_rank

namespace quantized {

// The outputs of `count` matrices on the same x are side by side.
void linear(const Matrix* const* matrices, int count, const float* x, int rows, const float* bias, float* out);
void linear(const Nf4Matrix* const* matrices, int count, const float* x, int rows, const float* bias, float* out);

}  // namespace quantized
