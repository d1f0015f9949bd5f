// Low-rank additions to a linear's outputs, whose rows may use different adapters. Adapters are small: each is read
// once from memory for all rows that use it.
#pragma once

#include <algorithm>

#include "pool.h"
#include "units.h"

namespace low_rank {

// One part and the rows that use it; `inner` [their number][rank] lies between the two products.
struct Use {
    const Part* part;
    const int* rows;
    int count;
    float* inner;
};

constexpr int TALL = 4;                    // Rows of a matrix are taken so many at a time.
constexpr int WIDE = LANES == 16 ? 4 : 2;  // Vectors of outputs, or rows of x, are taken so many at a time.
constexpr int RANKS = 16;                  // A task takes so many ranks.
constexpr int OUTPUTS = 8 * WIDE * LANES;  // A task takes so many outputs.

// N rows of `down` times T rows of x.
template <class W, int N, int T>
INLINE void shrink(const Addition& a, const Use& use, const W* down, int first_rank, int first_row) {
    Floats acc[N][T] = {};
    const float* x[T];
    for (int t = 0; t < T; ++t) x[t] = a.x + size_t(use.rows[first_row + t]) * a.inputs;
    int k = 0;
    for (; k + LANES <= a.inputs; k += LANES) {
        Floats w[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            const W* const from = down + size_t(i) * a.inputs + k;
            __builtin_prefetch(from + size_t(N) * a.inputs, 0, 2);  // The rows that come next.
            w[i] = load(from);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const Floats v = load(x[t] + k);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) acc[i][t] += w[i] * v;
        }
    }
    for (int i = 0; i < N; ++i)
        for (int t = 0; t < T; ++t) {
            float total = sum(acc[i][t]);
            for (int rest = k; rest < a.inputs; ++rest) total += to_float(down[size_t(i) * a.inputs + rest]) * x[t][rest];
            use.inner[size_t(first_row + t) * use.part->rank + first_rank + i] =
                total * a.uses.scales[use.rows[first_row + t]];
        }
}

template <class W> void shrink_rows(const Addition& a, const Use& use, int begin, int end) {
    const auto down = [&](int rank) { return (const W*)use.part->down + size_t(rank) * a.inputs; };
    int rank = begin;
    for (; rank + TALL <= end; rank += TALL) {
        int t = 0;
        for (; t + WIDE <= use.count; t += WIDE) shrink<W, TALL, WIDE>(a, use, down(rank), rank, t);
        for (; t + 2 <= use.count; t += 2) shrink<W, TALL, 2>(a, use, down(rank), rank, t);
        for (; t < use.count; ++t) shrink<W, TALL, 1>(a, use, down(rank), rank, t);
    }
    for (; rank < end; ++rank)
        for (int t = 0; t < use.count; ++t) shrink<W, 1, 1>(a, use, down(rank), rank, t);
}

// V vectors of outputs from n, of T rows.
template <class W, int V, int T> INLINE void expand(const Addition& a, const Use& use, int first_row, int n) {
    const Part& part = *use.part;
    Floats acc[T][V];
    float* out[T];
    const float* inner[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        out[t] = a.out + size_t(use.rows[first_row + t]) * a.outputs + part.first + n;
        inner[t] = use.inner + size_t(first_row + t) * part.rank;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[t][v] = load(out[t] + v * LANES);
    }
    const W* up = (const W*)part.up + n;
    for (int r = 0; r < part.rank; ++r, up += part.outputs) {
        Floats w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            w[v] = load(up + v * LANES);
            __builtin_prefetch(up + (V + v) * LANES, 0, 2);  // The outputs that come next.
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[t][v] += w[v] * inner[t][r];
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(out[t] + v * LANES, acc[t][v]);
}

template <class W> void expand_rows(const Addition& a, const Use& use, int begin, int end) {
    const Part& part = *use.part;
    int n = begin;
    const auto step = [&](auto vectors) __attribute__((always_inline)) {
        int t = 0;
        for (; t + 4 <= use.count; t += 4) expand<W, vectors.value, 4>(a, use, t, n);
        for (; t + 2 <= use.count; t += 2) expand<W, vectors.value, 2>(a, use, t, n);
        for (; t < use.count; ++t) expand<W, vectors.value, 1>(a, use, t, n);
        n += vectors.value * LANES;
    };
    while (n + WIDE * LANES <= end) step(std::integral_constant<int, WIDE>());
    while (n + LANES <= end) step(std::integral_constant<int, 1>());
    for (int t = 0; t < use.count; ++t)
        for (int rest = n; rest < end; ++rest) {
            float total = 0;
            for (int r = 0; r < part.rank; ++r)
                total += use.inner[size_t(t) * part.rank + r] * to_float(((const W*)part.up)[size_t(r) * part.outputs + rest]);
            a.out[size_t(use.rows[t]) * a.outputs + part.first + rest] += total;
        }
}

template <class F> INLINE void with_dtype(int dtype, F&& work) {
    if (dtype == 0) work(float());
    if (dtype == 1) work(bf16());
    if (dtype == 2) work(f16());
}

void add(const Addition& a, const Adapter* const* adapters) {
    static thread_local std::vector<int> rows;
    static thread_local std::vector<Use> uses;
    static thread_local Scratch memory;
    rows.clear();
    uses.clear();
    rows.reserve(a.rows);  // Pointers into it stay valid.
    size_t floats = 0;
    for (int i = 0; i < a.uses.count; ++i) {
        if (!adapters[i]) continue;
        const size_t begin = rows.size();
        for (int t = 0; t < a.rows; ++t)
            if (a.uses.slots[t] == a.uses.present[i]) rows.push_back(t);
        const int found = int(rows.size() - begin);
        for (int p = 0; found && p < adapters[i]->count; ++p) {
            const Part& part = adapters[i]->parts[p];
            uses.push_back({&part, rows.data() + begin, found, nullptr});
            floats += size_t(found) * part.rank;
        }
    }
    float* inner = memory.floats(floats + 1);
    struct Task { const Use* use; int begin; };
    static thread_local std::vector<Task> down, up;
    down.clear();
    up.clear();
    for (Use& use : uses) {
        use.inner = inner;
        inner += size_t(use.count) * use.part->rank;
        for (int rank = 0; rank < use.part->rank; rank += RANKS) down.push_back({&use, rank});
        for (int n = 0; n < use.part->outputs; n += OUTPUTS) up.push_back({&use, n});
    }
    const Task *const downs = down.data(), *const ups = up.data();
    pool().run(int(down.size()), [&](int task) {
        with_dtype(downs[task].use->part->dtype, [&](auto w) {
            const int end = std::min(downs[task].use->part->rank, downs[task].begin + RANKS);
            shrink_rows<decltype(w)>(a, *downs[task].use, downs[task].begin, end);
        });
    });
    pool().run(int(up.size()), [&](int task) {
        const Use& use = *ups[task].use;
        const int end = std::min(use.part->outputs, ups[task].begin + OUTPUTS);
        with_dtype(use.part->dtype, [&](auto w) { expand_rows<decltype(w)>(a, use, ups[task].begin, end); });
    });
}

}  // namespace low_rank
