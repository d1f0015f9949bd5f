// Sums of a softmax, in exponents of two, that grow by parts.
#pragma once

#include "simd.h"

constexpr float UNSEEN = -1e30f;   // A score of no weight, without the NaN that infinities make.
constexpr float NOTHING = -3e38f;  // The largest exponent before the first part.
constexpr float LN2 = 0.6931471806f;

// By what two softmaxes' sums are multiplied to join: those before, relative to their own largest score, and those now.
struct Joint {
    Floats largest, before, now;

    Joint(Floats largest_before, Floats largest_now, Floats exponent)
        : largest(larger(largest_before, largest_now)), before(power_of_two((largest_before - largest) * exponent)),
          now(power_of_two((largest_now - largest) * exponent)) {}
    INLINE Floats of(Floats sum, Floats more) const { return plus_product(more * now, sum, before); }
};
