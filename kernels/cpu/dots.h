// Few rows of x times the transpose of a weight: the weight is read once, as it is stored, and meets all rows of x as
// it passes. With one row memory is the limit, with eight arithmetic is as much. Each row's sums have the same order, which
// is that of linear.h's many rows, too.
#pragma once

#include <algorithm>

#include "pool.h"
#include "units.h"

constexpr int FEW = 64;  // No more rows of x go this way; those that are decoded together are seldom more.
constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int MOST_COLUMNS = LANES == 16 ? 8 : 4;  // Rows of x are taken so many at a time.
constexpr int MOST_DEPTH = 768;  // Inputs at a time, however many rows there are: they stay in a core's first cache.
constexpr int TASK_BYTES = 96 * 1024;   // Bytes of weight that hide the taking of a task.

// How many rows of the weight meet T rows of x at a time: beside their sums, registers hold two vectors of each row,
// one of x and a mask. Four give the processor streams enough to read.
constexpr int dot_rows(int T) { return std::min(4, (REGISTERS - 2) / (T + 2)); }

// Vectors that are widened at a time. Two bfloat16 share a word: the even ones come first, then the odd.
template <class W> constexpr int PARTS_OF = 1;
template <> constexpr int PARTS_OF<bf16> = 2;
template <class W> constexpr int STEP_OF = PARTS_OF<W> * LANES;

// Of so many inputs the sums of lanes are taken together: whole steps, as even as can be.
template <class W> INLINE int depth_of(int inputs) {
    constexpr int STEP = STEP_OF<W>;
    const int steps = (inputs + STEP - 1) / STEP, most = MOST_DEPTH / STEP, parts = (steps + most - 1) / most;
    return parts ? (steps + parts - 1) / parts * STEP : STEP;
}

template <class W> INLINE void widen(const W* from, Floats (&to)[PARTS_OF<W>]) { to[0] = load(from); }
INLINE void widen(const bf16* from, Floats (&to)[2]) {
    const Words pairs = load_as<Words>(from);
    to[0] = (Floats)(pairs << 16);
    to[1] = (Floats)(pairs & 0xffff0000);
}

// STEP_OF<W> numbers of x in the order of `widen`, `apart` floats from vector to vector.
template <class W> INLINE void arrange(const float* from, float* to, int apart) {
    if constexpr (PARTS_OF<W> == 1) return store(to, load(from));
    Ints even;
    for (int lane = 0; lane < LANES; ++lane) even[lane] = 2 * lane;
    const Floats first = load(from), second = load(from + LANES);
    store(to, __builtin_shuffle(first, second, even));
    store(to + apart, __builtin_shuffle(first, second, even + 1));
}

// T rows of x as a panel [steps][PARTS_OF<W>][T][LANES], with zeros after the last input.
template <class W> INLINE void interleave(const float* x, int inputs, int T, float* panel) {
    constexpr int STEP = STEP_OF<W>;
    for (int t = 0; t < T; ++t, x += inputs) {
        float* to = panel + t * LANES;
        int k = 0;
        for (; k + STEP <= inputs; k += STEP, to += STEP * T) arrange<W>(x + k, to, T * LANES);
        if (k == inputs) continue;
        float rest[STEP] = {};
        std::copy(x + k, x + inputs, rest);
        arrange<W>(rest, to, T * LANES);
    }
}

// N rows of the weight, `width` apart, times the T rows of a panel step, added to acc [N][T].
template <class W, int N, int T>
INLINE void multiply_step(const W* weight, size_t width, const float* panel, Floats* acc) {
    Floats w[N][PARTS_OF<W>];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) widen(weight + i * width, w[i]);
#pragma GCC unroll 2
    for (int part = 0; part < PARTS_OF<W>; ++part)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Floats x = held(load(panel + (part * T + t) * LANES));
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) acc[i * T + t] = plus_product(acc[i * T + t], w[i][part], x);
        }
}

// Sums of COUNT vectors, by trees of as many as there are lanes, or of the largest power of two that is left.
template <int COUNT> INLINE void store_sums(const Floats* v, float* to) {
    constexpr int TREE = largest_tree(COUNT);
    const Floats lanes = sums<TREE>(v);
    memcpy(to, &lanes, TREE * sizeof(float));
    if constexpr (COUNT > TREE) store_sums<COUNT - TREE>(v + TREE, to + TREE);
}

// What is multiplied at a time: inputs from .. from + depth of T rows of x from `first_row`.
struct Panel {
    const float* x;  // Ordered as `interleave` leaves them.
    int first_row, from, depth;
};

// Rows n .. n + N of the weight times a panel of T rows, into `out`, or added to it after the first panel. Where rows
// are short the processor's own prefetching finds no stream to follow.
template <class W, int N, int T> INLINE void dots_of(const Linear& l, const Panel& panel, int n) {
    constexpr int STEP = STEP_OF<W>;
    const size_t width = l.inputs;
    const W* const weight = (const W*)l.weight + n * width + panel.from;
    Floats acc[N * T];
#pragma GCC unroll 32
    for (Floats& a : acc) a = Floats{};
    const float* x = panel.x;
    int k = 0;
    for (; k + STEP <= panel.depth; k += STEP, x += STEP * T) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) __builtin_prefetch(weight + (N + i) * width + k, 0, 2);
        multiply_step<W, N, T>(weight + k, width, x, acc);
    }
    if (k < panel.depth) {
        W rest[N][STEP] = {};
        for (int i = 0; i < N; ++i) std::copy_n(weight + i * width + k, panel.depth - k, rest[i]);
        multiply_step<W, N, T>(rest[0], STEP, x, acc);
    }
    float totals[N * T];
    store_sums<N * T>(acc, totals);
    float* out = l.out + size_t(panel.first_row) * l.outputs + n;
    for (int t = 0; t < T; ++t, out += l.outputs)
        for (int i = 0; i < N; ++i) out[i] = totals[i * T + t] + (panel.from ? out[i] : l.bias ? l.bias[n + i] : 0.0f);
}

// Rows begin .. end of the weight times a panel of T rows.
template <class W, int T> void dots_of_task(const Linear& l, const Panel& panel, int begin, int end) {
    int n = begin;
    for (; n + dot_rows(T) <= end; n += dot_rows(T)) dots_of<W, dot_rows(T), T>(l, panel, n);
    for (; n < end; ++n) dots_of<W, 1, T>(l, panel, n);
}

// The same, where the number of rows isn't known to the compiler.
template <class W, int T = MOST_COLUMNS>
INLINE void dots_of_task(int rows, const Linear& l, const Panel& panel, int begin, int end) {
    if constexpr (T > 1)
        if (rows < T) return dots_of_task<W, T - 1>(rows, l, panel, begin, end);
    dots_of_task<W, T>(l, panel, begin, end);
}

template <class W> void dots(const Linear& l) {
    constexpr int STEP = STEP_OF<W>;
    static thread_local Scratch memory;
    const int passes = (l.rows + MOST_COLUMNS - 1) / MOST_COLUMNS;  // Passes are as even as can be.
    const auto first_of = [&](int pass) { return l.rows * pass / passes; };
    const int steps = (l.inputs + STEP - 1) / STEP;
    float* const panels = memory.floats(size_t(l.rows) * steps * STEP);
    for (int pass = 0; pass < passes; ++pass) {
        const int first = first_of(pass);
        interleave<W>(l.x + size_t(first) * l.inputs, l.inputs, first_of(pass + 1) - first,
                      panels + size_t(first) * steps * STEP);
    }
    const int depth = depth_of<W>(l.inputs);
    const int wanted = std::max<int>(1, TASK_BYTES / (l.inputs * sizeof(W)));
    const int each = (wanted + 11) / 12 * 12;  // Every dot_rows divides it.
    pool().run((l.outputs + each - 1) / each, [&](int task) {
        const int begin = task * each, end = std::min(begin + each, l.outputs);
        for (int pass = 0; pass < passes; ++pass)
            for (int from = 0; from < l.inputs; from += depth) {
                const int first = first_of(pass), rows = first_of(pass + 1) - first;
                const float* const x = panels + size_t(first) * steps * STEP + size_t(from) * rows;
                dots_of_task<W>(rows, l, {x, first, from, std::min(depth, l.inputs - from)}, begin, end);
            }
    });
}
