// x [T, K] float32 times matrices of integer codes: packed codes are read once, as they are stored, for eight rows of x
// at a time, and never expanded.
#pragma once

#include "pool.h"
#include "quantized_units.h"

namespace quantized {

constexpr size_t LEAST_TASK = 48 * 1024;       // Bytes of codes that hide the taking of a task.
constexpr size_t MOST_TASK = 2 * 1024 * 1024;  // A thread that waits for a processor holds the others up by so many.
constexpr int KEPT = 256 * 1024;  // Bytes of codes that a core's cache keeps while many rows of x pass.
constexpr int PASS = 512;         // Rows of x that are held in fixed point at a time.
constexpr int MOST_MATRICES = 8;  // No more matrices share a call.

// Rows of x at a time, largest first: eight, four, two, one.
INLINE int rows_together(int left) {
    int count = MOST_ROWS;
    while (count > left) count /= 2;
    return count;
}

template <int T> INLINE void multiply_tile(const Matrix& m, int tile, Place place, Tile* totals) {
    for (int t = 0; t < T; ++t) totals[t] = {};
    if (add_units<T>(m, tile, place, totals)) return;
    for_runs(m, 0, m.groups, [&](auto bits, auto coding, int first, int last) __attribute__((always_inline)) {
        add_groups<bits.value, T, Coding(coding.value)>(m, tile, first, last, place, totals);
    });
}

// A tile's results, `count` of which are outputs, with the bias [16] or null, into a row of the output.
INLINE void store_tile(const Tile& tile, const float* bias, float* out, int count) {
    alignas(64) float numbers[OUTPUTS];
    memcpy(numbers, &tile, sizeof numbers);
    for (int i = 0; i < count; ++i) out[i] = numbers[i] + (bias ? bias[i] : 0.0f);
}

// Where the tasks of one pass over 0 .. tiles end, behind a 0. Memory delivers a task's first bytes late, so they are large;
// and ever smaller towards the end, where each thread has one of the last ones, so that all end at about the same time.
inline std::vector<int> shrinking_tasks(int tiles, size_t bytes, int threads) {
    std::vector<int> borders{0};
    const size_t each = bytes / tiles + 1, last = 2 * LEAST_TASK / each * threads;
    for (int begin = 0; begin < tiles; borders.push_back(begin)) {
        const int left = tiles - begin;
        const size_t wanted = std::min(MOST_TASK / each, size_t(left) / (2 * threads));
        begin += size_t(left) > last ? std::max(1, int(wanted)) : (left + threads - 1) / threads;
    }
    return borders;
}

// Calls work(begin, end) for ranges of 0 .. tiles, of `bytes` altogether, on all threads.
template <class F> void for_tiles(int tiles, size_t bytes, int rows, F&& work) {
    if (!tiles || !rows) return;
    const int threads = pool().threads();
    if (rows <= MOST_ROWS) {
        const std::vector<int> borders = shrinking_tasks(tiles, bytes, threads);
        return pool().run(int(borders.size()) - 1, [&](int task) { work(borders[task], borders[task + 1]); });
    }
    const size_t wanted = std::max(size_t(4 * threads), bytes / KEPT + 1);
    const size_t tasks = std::min(size_t(tiles), (wanted + threads - 1) / threads * threads);  // Shares are equal.
    const auto border = [&](size_t task) { return int(task * tiles / tasks); };
    pool().run(int(tasks), [&](int task) { work(border(task), border(task + 1)); });
}

// Calls work(first, T) for the lots of rows, T their number as a constant.
template <class F> INLINE void for_lots(int rows, F&& work) {
    for (int first = 0, together; first < rows; first += together) {
        together = rows_together(rows - first);
        if constexpr (MOST_ROWS == 8) {
            if (together == 8) work(first, std::integral_constant<int, 8>());
            if (together == 4) work(first, std::integral_constant<int, 4>());
        }
        if (together == 2) work(first, std::integral_constant<int, 2>());
        if (together == 1) work(first, std::integral_constant<int, 1>());
    }
}

// x read as one matrix reads it, in fixed point: rows in lots of eight, four, two and one.
struct Input {
    int8_t* quads;  // [lots][R / 4][rows of the lot][8]
    Share* shares;  // [lots][shares][rows of the lot]
    int num_shares;
};

INLINE void prepare(const Matrix& m, const float* x, int rows, const Input& input) {
    const auto row = [&](int t) {
        int first = 0, together = rows_together(rows);
        while (first + together <= t) first += together, together = rows_together(rows - first);
        to_fixed(m, x + size_t(t) * m.inputs, input.quads + size_t(first) * 2 * m.rows() + 8 * (t - first),
                 input.shares + size_t(first) * input.num_shares + (t - first), together);
    };
    if (rows <= MOST_ROWS)
        for (int t = 0; t < rows; ++t) row(t);
    else
        pool().run(rows, row);
}

// The matrices' outputs side by side: bias and each row of `out` are as wide as all together.
inline void multiply(const Matrix* const* matrices, int count, const float* x, int rows, const float* bias, float* out) {
    static thread_local Scratch memory;
    int first_tile[MOST_MATRICES + 1] = {}, first_output[MOST_MATRICES + 1] = {};
    Input inputs[MOST_MATRICES];
    size_t bytes = 0, code_bytes = 0, at[MOST_MATRICES] = {};
    for (int i = 0; i < count; ++i) {
        const Matrix& m = *matrices[i];
        const int tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS;
        first_tile[i + 1] = first_tile[i] + tiles;
        first_output[i + 1] = first_output[i] + m.outputs;
        code_bytes += tiles * m.tile_bytes;
        if (i && m.reads_as(*matrices[i - 1])) continue;
        at[i] = bytes;
        inputs[i].num_shares = count_shares(m);
        bytes += rows * (size_t(2) * m.rows() + sizeof(Share) * inputs[i].num_shares);
        bytes = (bytes + 63) / 64 * 64;
    }
    char* const start = (char*)memory.floats(bytes / 4 + 1);
    for (int i = 0; i < count; ++i) {
        const Matrix& m = *matrices[i];
        if (i && m.reads_as(*matrices[i - 1])) {
            inputs[i] = inputs[i - 1];
            continue;
        }
        inputs[i].shares = (Share*)(start + at[i]);
        inputs[i].quads = (int8_t*)(inputs[i].shares + size_t(rows) * inputs[i].num_shares);
        prepare(m, x, rows, inputs[i]);
    }
    const int tiles = first_tile[count], width = first_output[count];
    for_tiles(tiles, code_bytes, rows, [&](int begin, int end) {
        for_lots(rows, [&](int first, auto together) {
            for (int index = begin, i = 0; index < end; ++index) {
                while (index >= first_tile[i + 1]) ++i;
                const Matrix& m = *matrices[i];
                const int tile = index - first_tile[i], n = first_output[i] + tile * OUTPUTS;
                Tile totals[together.value];
                multiply_tile<together.value>(m, tile,
                                              {m.codes + tile * m.tile_bytes,
                                               inputs[i].quads + size_t(first) * 2 * m.rows(),
                                               inputs[i].shares + size_t(first) * inputs[i].num_shares},
                                              totals);
                for (int t = 0; t < together.value; ++t)
                    store_tile(totals[t], bias ? bias + n : nullptr, out + size_t(first + t) * width + n,
                               std::min(OUTPUTS, m.outputs - tile * OUTPUTS));
            }
        });
    });
}

}  // namespace quantized
