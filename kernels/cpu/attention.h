// Attention of a step's queries over everything cached of their sequences.
//
// A sequence with one query takes decode.h's way, one with more prefill.h's; both cut their work into tasks, which all
// threads share, and neither needs memory that grows with the context.
#pragma once

#include "cache.h"

struct Rope {
    const float *pages, *places;  // [S, num_pages, 2, half], [S, PAGE, 2, half]; null without rotation
    const int32_t* set_of;        // [B]
    int num_pages, half;
};

struct Attention {
    const float* queries;  // [T, H, D]
    float* out;            // [T, H, D]
    Cache cache;
    Rope rope;
    const int32_t *query_starts, *context_lens, *block_tables;
    int sequences, block_table_width, heads, window;  // window 0: none
    float scale, softcap;                             // softcap 0: none

    int group() const { return heads / cache.kv_heads; }
    const int32_t* pages(int b) const { return block_tables + size_t(b) * block_table_width; }
    const float* page_angles(int b, int index) const {
        return rope.pages + (size_t(rope.set_of[b]) * rope.num_pages + index) * 2 * rope.half;
    }
    const float* place_angles(int b) const { return rope.places + size_t(rope.set_of[b]) * PAGE * 2 * rope.half; }
    int first_seen(int position) const { return window ? std::max(0, position - window + 1) : 0; }
    // A head's factor, with ones to the end of the last vector.
    void copy_factor(int head, float* to) const {
        std::fill(to, to + MOST_DIMS, 1.0f);
        std::copy_n(cache.key_factor + head * cache.dims, cache.dims, to);
    }
};

constexpr float UNSEEN = -1e30f;  // a score whose exponential is 0, without the NaN that infinities make
constexpr float LN2 = 0.6931471806f;
