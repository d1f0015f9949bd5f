// Attention of llama.cpp's steps over the cells of its cache, in the place of ggml's own.
//
// ggml gives each query of a step a pass of its own over keys and values, until there are 64 of them. Here the queries of
// a block (tokens that follow one another in a sequence, or begin alike, times the heads of a group) are the lanes of
// vectors, and share each tile of cells. All numbers are float32. The cells that a token sees are taken in their order, in
// tiles and tiles in parts; so what it gets does not depend on who else has cells in between, how many tokens of its
// sequence run in a step, or how many threads. Where layers look back through windows, the borders of tiles stand at fixed
// cells, as the first that is seen is no beginning; elsewhere it doesn't matter either where a sequence's cells lie.
// Sources: those of attention.h.
#pragma once

#include <cmath>

#include "cells_plan.h"
#include "pool.h"
#include "softmax.h"

namespace cells {

constexpr int SHORT = LANES == 4 ? 4 : 8;  // Cells, or dimensions, whose sums are in registers at a time
constexpr int MOST_DIMS = 1024;
constexpr int PAD = 16;  // Numbers between rows beside their dimensions: no power of two in all.

// How rows of keys or values become floats: blocks of so many dimensions and bytes, and what reads a row of them.
struct Reader {
    int dims, bytes;
    void (*read)(const uint8_t* row, int dims, float* to);
};

template <class T> void read_numbers(const uint8_t* row, int dims, float* to) {
    for (int d = 0; d < dims; d += LANES) store(to + d, load((const T*)row + d));
}
inline void read_q8(const uint8_t* row, int dims, float* to) {
    for (int d = 0; d < dims; d += 32, row += 34) {
        const Floats scale = all(to_float(load_as<f16>(row)));
        for (int i = 0; i < 32; i += LANES) store(to + d + i, widen(load_as<Bytes>(row + 2 + i)) * scale);
    }
}
inline void read_q4(const uint8_t* row, int dims, float* to) {
    for (int d = 0; d < dims; d += 32, row += 18) {
        const Floats scale = all(to_float(load_as<f16>(row)));
        for (int i = 0; i < 16; i += LANES) {
            const Bytes both = load_as<Bytes>(row + 2 + i);
            store(to + d + i, (widen(both & 15) - 8.0f) * scale);
            store(to + d + 16 + i, (widen(both >> 4) - 8.0f) * scale);
        }
    }
}
inline Reader reader_of(int type) {
    switch (type) {
        case ggml::TYPE_F32: return {1, 4, read_numbers<float>};
        case ggml::TYPE_F16: return {1, 2, read_numbers<f16>};
        case ggml::TYPE_BF16: return {1, 2, read_numbers<bf16>};
        case ggml::TYPE_Q8_0: return {32, 34, read_q8};
        case ggml::TYPE_Q4_0: return {32, 18, read_q4};
        default: return {1, 0, nullptr};
    }
}

// Whether a node of attention is one that attend() computes.
inline bool can_take(const Tensor& node) {
    for (int i = ggml::QUERIES; i <= ggml::MASK; ++i)
        if (!node.src[i] || node.src[i]->ne[3] != 1) return false;
    const Tensor &q = *node.src[ggml::QUERIES], &k = *node.src[ggml::KEYS], &v = *node.src[ggml::VALUES],
                 &mask = *node.src[ggml::MASK];
    const Tensor* const sinks = node.src[ggml::SINKS];
    const auto fits = [](const Tensor& t) {
        const Reader reader = reader_of(t.type);  // A row that isn't in one piece has a larger first step.
        return reader.read && t.ne[0] % std::max(16, reader.dims) == 0 && t.ne[0] <= MOST_DIMS && int(t.nb[0]) == reader.bytes;
    };
    return ggml::params_of<ggml::AttentionParams>(node).max_bias == 0 && node.type == ggml::TYPE_F32 && node.nb[0] == 4 &&
           q.type == ggml::TYPE_F32 && q.nb[0] == 4 && q.ne[0] == k.ne[0] && fits(k) && fits(v) && k.ne[1] == v.ne[1] &&
           k.ne[2] == v.ne[2] && k.ne[2] > 0 && q.ne[2] % k.ne[2] == 0 && q.ne[2] / k.ne[2] <= MOST_LANES &&
           mask.type == ggml::TYPE_F16 && mask.nb[0] == 2 && mask.ne[2] == 1 && mask.ne[0] >= k.ne[1] &&
           mask.ne[1] >= q.ne[1] && (!sinks || sinks->type == ggml::TYPE_F32);
}

// Sums of a softmax: outputs in panels [panels][dims][panel], maxima and totals [lanes].
struct Sums {
    float *outputs, *maxima, *totals;

    Sums(float* memory, size_t lanes, int dims)
        : outputs(memory), maxima(memory + lanes * dims), totals(memory + lanes * (dims + 1)) {}
    void clear(size_t lanes, int dims, float maximum) {
        std::fill_n(outputs, lanes * dims, 0.0f);
        std::fill_n(maxima, lanes, maximum);
        std::fill_n(totals, lanes, 0.0f);
    }
};

// acc[i][j] += sum over k < depth of a[i * ROW_STEP + k * STEP] * panel[k][j]
template <int ROWS, int WIDE> INLINE void products(Floats (&acc)[ROWS][WIDE], const float* a, size_t row_step, size_t step,
                                                   const float* panel, int depth) {
    for (int k = 0; k < depth; ++k, a += step, panel += WIDE * LANES) {
        Floats b[WIDE];
#pragma GCC unroll 2
        for (int j = 0; j < WIDE; ++j) b[j] = load(panel + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Floats x = all(a[i * row_step]);
#pragma GCC unroll 2
            for (int j = 0; j < WIDE; ++j) acc[i][j] = plus_product(acc[i][j], x, b[j]);
        }
    }
}

// One head of keys and values, and the block of queries that read it; WIDE vectors are a panel.
template <int WIDE> struct Attention {
    static constexpr int PANEL = WIDE * LANES;
    const Tensor& node;
    const Plan& plan;
    const Block& block;
    const ggml::AttentionParams params;
    const int head, dims, value_dims, lanes, panels;
    const Reader read_keys, read_values;
    float *queries, *keys, *values, *scores, *bias;  // [panels][dims][PANEL], [TILE][dims + PAD], ..., [TILE][PANEL] each

    size_t all_lanes() const { return size_t(panels) * PANEL; }
    size_t sum_floats() const { return all_lanes() * (value_dims + 2); }
    const Tensor& source(int i) const { return *node.src[i]; }
    int token_of(int lane) const { return block.first + std::min(lane, lanes - 1) / plan.group; }
    const uint16_t* mask_of(int token) const { return (const uint16_t*)source(ggml::MASK).at(token, 0); }

    Attention(const Tensor& node, const ggml::AttentionParams& params, const Plan& plan, const Item& item)
        : node(node), plan(plan), block(plan.blocks[item.block]), params(params), head(item.head),
          dims(int(source(ggml::KEYS).ne[0])), value_dims(plan.value_dims), lanes(block.tokens() * plan.group),
          panels((lanes + PANEL - 1) / PANEL), read_keys(reader_of(source(ggml::KEYS).type)),
          read_values(reader_of(source(ggml::VALUES).type)) {}

    // Memory for what is read; returns that for `more` floats.
    float* take_memory(size_t more) {
        static thread_local Scratch memory;
        const size_t key_row = dims + PAD, value_row = value_dims + PAD;
        float* at = memory.floats(all_lanes() * dims + TILE * (key_row + value_row + 2 * PANEL) + more);
        const auto take = [&](size_t count) { return at += count, at - count; };
        queries = take(all_lanes() * dims);
        keys = take(TILE * key_row);
        values = take(TILE * value_row);
        scores = take(TILE * PANEL);
        bias = take(TILE * PANEL);
        return at;
    }

    void read_queries() {
        const float scale = params.softcap ? params.scale / params.softcap : params.scale / LN2;
        for (int lane = 0; lane < int(all_lanes()); ++lane) {
            const int real = std::min(lane, lanes - 1);  // Idle lanes repeat the last.
            const float* const from =
                (const float*)source(ggml::QUERIES).at(block.first + real / plan.group, head * plan.group + real % plan.group);
            float* const to = queries + size_t(lane / PANEL) * PANEL * dims + lane % PANEL;
            for (int d = 0; d < dims; ++d) to[d * PANEL] = from[d] * scale;
        }
    }

    void read_tile(const int32_t* tile, int count) {
        const Tensor &k = source(ggml::KEYS), &v = source(ggml::VALUES);
        const int key_row = dims + PAD, value_row = value_dims + PAD;
        for (int i = 0; i < count; ++i) {
            read_keys.read(k.at(tile[i], head), dims, keys + i * key_row);
            read_values.read(v.at(tile[i], head), value_dims, values + i * value_row);
        }
        for (int i = count; i < (count + SHORT - 1) / SHORT * SHORT; ++i) {
            std::fill_n(keys + i * key_row, dims, 0.0f);
            std::fill_n(values + i * value_row, value_dims, 0.0f);
        }
    }

    enum Sight { SEES_ALL, SEES_SOME, SEES_NONE };

    Sight sight_of(int token, const int32_t* tile, int count) const {
        const uint16_t* const mask = mask_of(token);
        uint16_t any = 0;
        int hidden = 0;
        if (tile[count - 1] - tile[0] == count - 1) {
            for (int i = 0; i < count; ++i) any |= mask[tile[0] + i], hidden += mask[tile[0] + i] == HIDDEN;
        } else {
            for (int i = 0; i < count; ++i) any |= mask[tile[i]], hidden += mask[tile[i]] == HIDDEN;
        }
        return hidden == count ? SEES_NONE : any ? SEES_SOME : SEES_ALL;
    }

    // What a panel's lanes see of a list's tile; where that is a part of it, `bias` is what is added to their scores.
    Sight look(int panel, const List& list, const int32_t* tile, int count) {
        const int first = token_of(panel * PANEL), last = token_of(panel * PANEL + PANEL - 1) + 1;
        bool is_any = false, is_all = count % SHORT == 0 && list.first <= first && last <= list.last;
        for (int token = std::max(first, list.first); token < std::min(last, list.last); ++token) {
            const Sight sight = sight_of(token, tile, count);
            is_any |= sight != SEES_NONE, is_all &= sight == SEES_ALL;
        }
        if (!is_any) return SEES_NONE;
        if (is_all) return SEES_ALL;
        for (int lane = 0; lane < PANEL; ++lane) {
            float* const to = bias + lane;
            const int token = token_of(panel * PANEL + lane);
            if (lane && token == token_of(panel * PANEL + lane - 1)) {
                for (int i = 0; i < TILE; ++i) to[i * PANEL] = to[i * PANEL - 1];
                continue;
            }
            const uint16_t* const mask = mask_of(token);
            const int listed = list.first <= token && token < list.last ? count : 0;
            for (int i = 0; i < TILE; ++i) {
                const uint16_t bits = i < listed ? mask[tile[i]] : HIDDEN;
                to[i * PANEL] = bits == HIDDEN ? UNSEEN : to_float(f16{bits}) / LN2;
            }
        }
        return SEES_SOME;
    }

    void add_tile(const Sums& sums, int panel, int count, bool is_biased) {
        count = (count + SHORT - 1) / SHORT * SHORT;
        const float* const panel_queries = queries + size_t(panel) * PANEL * dims;
        Floats maxima[WIDE], before[WIDE], now[WIDE];
        for (int j = 0; j < WIDE; ++j) maxima[j] = all(UNSEEN);
        for (int k = 0; k < count; k += SHORT) {
            Floats acc[SHORT][WIDE] = {};
            products<SHORT, WIDE>(acc, keys + k * (dims + PAD), dims + PAD, 1, panel_queries, dims);
#pragma GCC unroll 8
            for (int i = 0; i < SHORT; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < WIDE; ++j) {
                    float* const to = scores + (k + i) * PANEL + j * LANES;
                    Floats score = acc[i][j];
                    if (params.softcap) score = hyperbolic_tangent(score) * (params.softcap / LN2);
                    if (is_biased) {
                        const Floats more = load(bias + (k + i) * PANEL + j * LANES);
                        score = more == UNSEEN ? all(UNSEEN) : score + more;
                    }
                    maxima[j] = larger(maxima[j], score);
                    store(to, score);
                }
        }
        for (int j = 0; j < WIDE; ++j) {
            const int lane = panel * PANEL + j * LANES;
            Floats total = {};
            for (int k = 0; k < count; ++k) {
                float* const score = scores + k * PANEL + j * LANES;
                const Floats weight = power_of_two(load(score) - maxima[j]);
                store(score, weight);
                total += weight;
            }
            const Joint joint(load(sums.maxima + lane), maxima[j], all(1.0f));
            before[j] = joint.before, now[j] = joint.now;
            store(sums.maxima + lane, joint.largest);
            store(sums.totals + lane, joint.of(load(sums.totals + lane), total));
        }
        float* output = sums.outputs + size_t(panel) * PANEL * value_dims;
        for (int d = 0; d < value_dims; d += SHORT) {
            Floats acc[SHORT][WIDE] = {};
            products<SHORT, WIDE>(acc, values + d, 1, value_dims + PAD, scores, count);
#pragma GCC unroll 8
            for (int i = 0; i < SHORT; ++i, output += PANEL)
#pragma GCC unroll 2
                for (int j = 0; j < WIDE; ++j) {
                    float* const to = output + j * LANES;
                    store(to, plus_product(acc[i][j] * now[j], load(to), before[j]));
                }
        }
    }

    void add_part(Sums sums, int part) {
        sums.clear(all_lanes(), value_dims, UNSEEN);
        for (int i = 0; i < block.num_lists; ++i) add_list(sums, plan.lists[block.lists + i], part);
    }

    void add_list(const Sums& sums, const List& list, int part) {
        const int begin = std::max(list.place, part * PART), end = std::min(list.place + list.count, (part + 1) * PART);
        for (int at = begin, next; at < end; at = next) {
            next = std::min(end, (at / TILE + 1) * TILE);
            const int32_t* const tile = plan.cells.data() + list.cells + at - list.place;
            const int count = next - at;
            bool is_read = false;
            for (int panel = 0; panel < panels; ++panel) {
                const Sight sight = look(panel, list, tile, count);
                if (sight == SEES_NONE) continue;
                if (!is_read) read_tile(tile, count);
                is_read = true;
                add_tile(sums, panel, count, sight == SEES_SOME);
            }
        }
    }

    // What a part has summed joins the parts before.
    void join(const Sums& whole, const Sums& part) {
        for (int lane = 0; lane < int(all_lanes()); lane += LANES) {
            const Joint joint(load(whole.maxima + lane), load(part.maxima + lane), all(1.0f));
            store(whole.maxima + lane, joint.largest);
            store(whole.totals + lane, joint.of(load(whole.totals + lane), load(part.totals + lane)));
            const size_t first = size_t(lane / PANEL) * PANEL * value_dims + lane % PANEL;
            for (int d = 0; d < value_dims; ++d) {
                float* const to = whole.outputs + first + size_t(d) * PANEL;
                store(to, joint.of(load(to), load(part.outputs + first + size_t(d) * PANEL)));
            }
        }
    }

    void write(const Sums& whole) {
        const Tensor* const sinks = node.src[ggml::SINKS];
        for (int lane = 0; lane < lanes; ++lane) {
            const int query_head = head * plan.group + lane % plan.group;
            float* const to = (float*)(node.data + query_head * node.nb[1] + token_of(lane) * node.nb[2]);
            const float* const from = whole.outputs + size_t(lane / PANEL) * PANEL * value_dims + lane % PANEL;
            float factor = whole.maxima[lane] > UNSEEN ? 1 / whole.totals[lane] : 0.0f;
            if (sinks && factor) {
                const float sink = ((const float*)sinks->data)[query_head] / LN2;
                const float largest = std::max(sink, whole.maxima[lane]);
                const float kept = exp2f(whole.maxima[lane] - largest);
                factor = kept / (whole.totals[lane] * kept + exp2f(sink - largest));
            }
            for (int d = 0; d < value_dims; ++d) to[d] = from[size_t(d) * PANEL] * factor;
        }
    }

    void run(const Item& item, Plan& shared) {
        if (item.part < 0) {
            float* const memory = take_memory(2 * sum_floats());
            Sums whole(memory, all_lanes(), value_dims), part(memory + sum_floats(), all_lanes(), value_dims);
            read_queries();
            whole.clear(all_lanes(), value_dims, NOTHING);
            for (int i = 0; i < block.parts(); ++i) {
                add_part(part, i);
                join(whole, part);
            }
            return write(whole);
        }
        float* const memory = take_memory(sum_floats());
        const auto sums_of = [&](int part) {
            const size_t number = size_t(head) * block.parts() + part;
            return Sums(shared.sums.data() + block.sums + number * sum_floats(), all_lanes(), value_dims);
        };
        read_queries();
        add_part(sums_of(item.part), item.part);
        std::atomic<int>& finished = shared.finished[block.finished + head];
        if (finished.fetch_add(1) + 1 < block.parts()) return;
        finished.store(0);  // For the next layer.
        Sums whole(memory, all_lanes(), value_dims);
        whole.clear(all_lanes(), value_dims, NOTHING);
        for (int i = 0; i < block.parts(); ++i) join(whole, sums_of(i));
        write(whole);
    }
};

// One thread's share of a node: threads take items one by one.
inline void attend(Tensor* node, int, int, void* what) {
    Node& of = *(Node*)what;
    Plan& plan = of.attender->plan(*node);
    for (int i; (i = of.next.fetch_add(1, std::memory_order_relaxed)) < int(plan.items.size());) {
        const Item& item = plan.items[i];
        if (plan.blocks[item.block].tokens() * plan.group <= LANES)
            Attention<1>(*node, of.params, plan, item).run(item, plan);
        else
            Attention<2>(*node, of.params, plan, item).run(item, plan);
    }
}

// Graphs are kept and computed again: then a node is ours already.
inline void Attender::take(Tensor& node) {
    if (node.op == operations.attention && can_take(node)) {
        Node& kept = nodes_[num_nodes_++ % NODES];
        kept.attender = this, kept.params = ggml::params_of<ggml::AttentionParams>(node);
        ggml::replace(node, operations, attend, &kept);
    } else if (node.op != operations.custom || ggml::params_of<ggml::Custom>(node).work != attend) {
        return;
    }
    ((Node*)ggml::params_of<ggml::Custom>(node).what)->next.store(0);
    ++step_;
}

}  // namespace cells
