// Operations on each token by itself: rotation of queries, normalization, gates.
#pragma once

#include <cmath>

#include "pool.h"
#include "units.h"

constexpr int TASK_FLOATS = 16 * 1024;  // Fewer aren't worth waking a thread.

// rows of `width` floats, a task's worth at a time
template <class F> static void for_rows(int rows, int width, F&& work) {
    const int at_a_time = std::max(1, TASK_FLOATS / std::max(1, width));
    pool().run((rows + at_a_time - 1) / at_a_time, [&](int task) {
        for (int row = task * at_a_time; row < std::min(rows, (task + 1) * at_a_time); ++row) work(row);
    });
}

// x rotated in place, in pairs i and i + half, by angles [2][half]: cosines, then sines.
INLINE void rotate_head(float* __restrict x, const float* __restrict angles, int half) {
    const float *cosine = angles, *sine = angles + half;
    for (int i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + half] = second * cosine[i] + first * sine[i];
    }
}

// x [T, H, D], tokens `stride` floats apart, to out [T, H, D], turned to the step's positions and times the set's
// query_scale.
static void rotate(const float* x, size_t stride, float* out, const Rope& rope, const Step& step, int tokens, int heads,
                   int dims) {
    const int half = rope.half;
    for_rows(tokens, heads * dims, [&](int t) {
        const int set = rope.set_of[step.sequence_of[t]], position = step.positions[t];
        const float* page = rope.pages + (size_t(set) * rope.num_pages + position / PAGE) * 2 * half;
        const float* place = rope.places + (size_t(set) * PAGE + position % PAGE) * 2 * half;
        for (int h = 0; h < heads; ++h) {
            float* const to = out + (size_t(t) * heads + h) * dims;
            std::copy_n(x + t * stride + size_t(h) * dims, dims, to);
            rotate_head(to, page, half);
            rotate_head(to, place, half);
            if (rope.query_scale[set] != 1)
                for (int d = 0; d < 2 * half; ++d) to[d] *= rope.query_scale[set];
        }
    });
}

static void rms_norm(const float* x, size_t stride, const float* weight, float* out, int rows, int width, float eps) {
    for_rows(rows, width, [&](int row) {
        const float* from = x + row * stride;
        float* const to = out + size_t(row) * width;
        Floats squares[2] = {};
        int i = 0;
        for (; i + 2 * LANES <= width; i += 2 * LANES)
            for (int j = 0; j < 2; ++j) squares[j] += load(from + i + j * LANES) * load(from + i + j * LANES);
        float total = sum(squares[0] + squares[1]);
        for (; i < width; ++i) total += from[i] * from[i];
        const float inverse = 1 / sqrtf(total / float(width) + eps);
        for (int k = 0; k < width; ++k) to[k] = from[k] * inverse * weight[k];
    });
}

enum Activation { SILU, GELU, GELU_TANH };

template <int ACTIVATION> INLINE Floats activate(Floats x) {
    if constexpr (ACTIVATION == SILU) return x / (1.0f + exponential(-x));
    if constexpr (ACTIVATION == GELU_TANH)
        return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
    Floats result;
    for (int i = 0; i < LANES; ++i) result[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.7071067812f));
    return result;
}

// gate_up [T, 2 * width] to out [T, width]: activation(gate) * up.
template <int ACTIVATION> static void gated(const float* gate_up, float* out, int rows, int width) {
    for_rows(rows, 2 * width, [&](int row) {
        const float *gate = gate_up + size_t(row) * 2 * width, *up = gate + width;
        float* const to = out + size_t(row) * width;
        int i = 0;
        for (; i + LANES <= width; i += LANES) store(to + i, activate<ACTIVATION>(load(gate + i)) * load(up + i));
        if (i == width) return;
        float rest[2][LANES] = {};
        std::copy(gate + i, gate + width, rest[0]);
        std::copy(up + i, up + width, rest[1]);
        store(rest[0], activate<ACTIVATION>(load(rest[0])) * load(rest[1]));
        std::copy_n(rest[0], width - i, to + i);
    });
}

static void gated(int activation, const float* gate_up, float* out, int rows, int width) {
    if (activation == SILU) gated<SILU>(gate_up, out, rows, width);
    if (activation == GELU) gated<GELU>(gate_up, out, rows, width);
    if (activation == GELU_TANH) gated<GELU_TANH>(gate_up, out, rows, width);
}
