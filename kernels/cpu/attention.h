// Attention of a step's queries over everything cached of their sequences.
//
// A sequence with one query takes decode.h's way, one with more prefill.h's; both cut their work into tasks, which all
// threads share, and neither needs memory that grows with the context.
#pragma once

#include "cache.h"

constexpr float UNSEEN = -1e30f;  // A score whose exponential is 0, without the NaN that infinities make.
constexpr float LN2 = 0.6931471806f;

// A head's factor, with ones to the end of the last vector.
INLINE void copy_factor(const Cache& c, int head, float* to) {
    std::fill(to, to + MOST_DIMS, 1.0f);
    std::copy_n(c.key_factor + head * c.dims, c.dims, to);
}
