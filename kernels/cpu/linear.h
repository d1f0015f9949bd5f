// x [T, K] float32 times the transpose of a weight [N, K] of any float type.
//
// Few rows take dots.h's way. Many: columns of x are packed to panels, rows of the weight expanded to float32 a few at a
// time; arithmetic is the limit. There a vector's lanes have sums of their own, which a tree joins. Where rows are to be
// batch invariant these are taken one after the other here, so that a row's result is the same, to the last bit; else a
// product has one sum, which takes less time.
#pragma once

#include "linear_words.h"

constexpr int EXPANDED = MOST_DEPTH + 16;   // Floats between expanded rows: no power of two, which would share cache sets
constexpr size_t PACKED = 192 * 1024;       // Floats of x packed at a time: a core's cache holds them.

// Lanes in the order in which the tree joins them, as `sums` in simd.h does: 0, then the one farthest from it, and so on.
INLINE int lane_at(int place) {
    int lane = 0;
    for (int bit = 1; bit < LANES; bit *= 2) lane |= place & bit ? LANES / 2 / bit : 0;
    return lane;
}
static bool is_batch_invariant = false;  // See linear.cpp.

// Where input k of a part `depth` deep stands in a panel: as `widen` leaves it, by lane where these have their own sums.
template <class W> INLINE int place_of(int k, int depth) {
    constexpr int PARTS = PARTS_OF<W>;
    const int lane = k % STEP_OF<W> / PARTS;
    if (!is_batch_invariant) return k / STEP_OF<W> * STEP_OF<W> + k % PARTS * LANES + lane;
    int place = 0;
    while (lane_at(place) != lane) ++place;
    return place * (depth / LANES) + k / STEP_OF<W> * PARTS + k % PARTS;
}

// The first `count` inputs of a part of a row of the weight, in steps as `widen` leaves them; zeros fill the last.
template <class W> INLINE void expand(const W* row, int count, int depth, float* to) {
    constexpr int STEP = STEP_OF<W>;
    const auto step = [&](const W* from) {
        Floats parts[PARTS_OF<W>];
        widen(from, parts);
        for (int i = 0; i < PARTS_OF<W>; ++i, to += LANES) store(to, parts[i]);
    };
    int k = 0;
    for (; k + STEP <= count; k += STEP) step(row + k);
    for (; k < depth; k += STEP) {
        W rest[STEP] = {};
        if (k < count) std::copy_n(row + k, count - k, rest);
        step(rest);
    }
}

// Rows `first` .. of x, inputs k0 .. k0 + count, in panels [panels][depth][PANEL]; what is past the last is zero.
INLINE void pack(const Linear& l, const int* places, int first_row, int k0, int count, int depth, float* panel) {
    const int rows = std::min(PANEL, l.rows - first_row);
    std::fill_n(panel, size_t(depth) * PANEL, 0.0f);
    for (int t = 0; t < rows; ++t) {
        const float* x = l.x + size_t(first_row + t) * l.inputs + k0;
        for (int k = 0; k < count; ++k) panel[size_t(places[k]) * PANEL + t] = x[k];
    }
}

// Rows n .. n + TALL of the weight times one panel, into `out`, or added to it where k0 > 0.
INLINE void block(const Linear& l, const float* expanded, const float* panel, int n, int first_row, int depth, int k0) {
    Floats joined[5][TALL][WIDE];  // Sums of 1, 2, 4 ... lanes that wait for as many more.
    const int each = depth / LANES;
    int level = 0;
    for (int place = 0; place < (is_batch_invariant ? LANES : 1); ++place) {
        Floats acc[TALL][WIDE] = {};
        if (is_batch_invariant)
            outer_products<TALL, EXPANDED, LANES>(acc, expanded + lane_at(place), panel + size_t(place) * each * PANEL, each);
        else
            outer_products<TALL, EXPANDED, 1>(acc, expanded, panel, depth);
        for (level = 0; place >> level & 1; ++level)
#pragma GCC unroll 16
            for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < WIDE; ++j) acc[i][j] += joined[level][i][j];
#pragma GCC unroll 16
        for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < WIDE; ++j) joined[level][i][j] = acc[i][j];
    }
    const int columns = std::min(PANEL, l.rows - first_row), rows = std::min(TALL, l.outputs - n);
    float lanes[TALL][PANEL];
    memcpy(lanes, joined[level], sizeof lanes);
    for (int t = 0; t < columns; ++t) {
        float* out = l.out + size_t(first_row + t) * l.outputs + n;
        for (int i = 0; i < rows; ++i)
            out[i] = lanes[i][t] + (k0 ? out[i] : l.bias ? l.bias[n + i] : 0.0f);
    }
}

template <class W> void linear_many_rows(const Linear& l) {
    static thread_local Scratch of_caller, of_thread;
    static thread_local std::vector<int> place_list;
    const int depth = depth_of<W>(l.inputs);
    place_list.resize(depth);
    int* const places = place_list.data();
    for (int k = 0; k < depth; ++k) places[k] = place_of<W>(k, depth);
    for (int k0 = 0; k0 < l.inputs; k0 += depth) {
        const int inputs = std::min(depth, l.inputs - k0);
        const int panels = (l.rows + PANEL - 1) / PANEL;
        const int panels_at_a_time = std::max<int>(1, std::min<size_t>(panels, PACKED / (size_t(depth) * PANEL)));
        float* const packed = of_caller.floats(size_t(panels_at_a_time) * depth * PANEL);
        for (int p0 = 0; p0 < panels; p0 += panels_at_a_time) {
            const int count = std::min(panels_at_a_time, panels - p0);
            pool().run(count, [&](int p) {
                pack(l, places, (p0 + p) * PANEL, k0, inputs, depth, packed + size_t(p) * depth * PANEL);
            });
            const int blocks = (l.outputs + TALL - 1) / TALL;
            constexpr int BLOCKS = 4;  // A task takes so many.
            pool().run((blocks + BLOCKS - 1) / BLOCKS, [&](int task) {
                float* const expanded = of_thread.floats(TALL * EXPANDED);
                for (int b = task * BLOCKS; b < std::min(blocks, (task + 1) * BLOCKS); ++b) {
                    for (int i = 0; i < TALL; ++i) {
                        const int n = std::min(b * TALL + i, l.outputs - 1);  // The last row is repeated, and not stored.
                        expand((const W*)l.weight + size_t(n) * l.inputs + k0, inputs, depth, expanded + i * EXPANDED);
                    }
                    for (int p = 0; p < count; ++p)
                        block(l, expanded, packed + size_t(p) * depth * PANEL, b * TALL, (p0 + p) * PANEL, depth, k0);
                }
            });
        }
    }
}

template <class W> void linear(const Linear& l) {
#if defined(__AVX512VNNI__)
    if (std::is_same<W, bf16>() && l.rows > FEW_FOR_WORDS && !is_batch_invariant) return linear_words(l);
#endif
    const int rest = l.rows % PANEL;  // Fewer than half a panel go faster the first way.
    const int few = l.rows <= FEW ? l.rows : 2 * rest <= PANEL ? rest : 0;
    Linear part = l;
    part.rows = l.rows - few;
    if (part.rows) linear_many_rows<W>(part);
    part.x += size_t(part.rows) * l.inputs;
    part.out += size_t(part.rows) * l.outputs;
    part.rows = few;
    if (few) dots<W>(part);
}

void linear(const Linear& l, int dtype) {
    if (dtype == PLAIN_FLOAT32) linear<float>(l);
    if (dtype == PLAIN_BFLOAT16) linear<bf16>(l);
    if (dtype == PLAIN_FLOAT16) linear<f16>(l);
}
