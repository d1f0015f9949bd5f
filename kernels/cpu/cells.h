// Attention of llama.cpp's steps over the cells of its cache, in the place of ggml's own.
//
// ggml gives each query of a step a pass of its own over keys and values, until there are 64 of them. Here the queries of
// a block (tokens that follow one another in a sequence, times the heads of a group) are the lanes of vectors, and share each tile
// of cells. All numbers are float32. A block lists the cells that it sees, in order, and takes them in tiles and tiles in
// parts; so what a token of a sequence gets does not depend on who else has cells in between, how many tokens of it run in
// a step, or how many threads. Where layers look back through windows, the borders of tiles stand at fixed cells, as the
// first that a block sees is no beginning; elsewhere it doesn't matter either where the sequence's cells lie. Sources:
// those of attention.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "ggml.h"
#include "pool.h"
#include "simd.h"

namespace cells {

using ggml::Tensor;

constexpr int TILE = 64;            // Cells between two corrections of the softmax.
constexpr int PART = 16 * TILE;     // Cells whose sums are their own.
constexpr int SHORT = LANES == 4 ? 4 : 8;  // Cells, or dimensions, whose sums are in registers at a time
constexpr int MOST_LANES = 8 * LANES;      // of a block
constexpr int MOST_DIMS = 1024;
constexpr int MOST_LISTED = 64;     // Tokens that have a list of cells in common: blocks of few tokens have one together.
constexpr int SHARED_TOKENS = 32;   // In steps of so many, or fewer, threads share the parts of a block.
constexpr size_t MOST_SHARED = size_t(64) << 20;  // Bytes of their sums; where there are more, they don't.
constexpr int PAD = 16;             // Numbers between rows beside their dimensions: no power of two in all.
constexpr float UNSEEN = -1e30f, NOTHING = -3e38f;  // As in attention.h.
constexpr float LN2 = 0.6931471806f;
constexpr uint16_t HIDDEN = 0xfc00;  // -infinity, as float16

// Tokens first .. last of a step, and the cells that they see.
struct Block {
    int first, last, cells, count;  // Of Plan::cells.
    int shift;                      // The first cell's place in the first part.
    int finished;                   // Of Plan::finished, for its first head.
    size_t sums;                    // Where its first head's parts have theirs.

    int tokens() const { return last - first; }
    int parts() const { return std::max(1, (shift + count + PART - 1) / PART); }
};

struct Item { int block, head, part; };  // part: -1 for all of them.

// What a step's nodes with the same mask, and heads alike, have in common.
struct Plan {
    uint64_t step = 0;
    const Tensor* mask = nullptr;
    int group = 0, kv_heads = 0, value_dims = 0;
    std::vector<Block> blocks;
    std::vector<int32_t> cells;
    std::vector<Item> items;
    std::vector<std::atomic<int>> finished;
    std::vector<float> sums;
};

class Attender;

// What is kept of a node of ggml's while its graph lives.
struct Node {
    Attender* attender = nullptr;
    ggml::AttentionParams params{};
    std::atomic<int> next{0};  // Of the plan's items.
};

// What belongs to one context of llama.cpp.
class Attender {
  public:
    ggml::Operations operations;
    const bool has_windows;

    explicit Attender(bool has_windows) : has_windows(has_windows) {}
    void take(Tensor& node);         // Before a graph is computed, by its nodes.
    Plan& plan(const Tensor& node);  // While it is, by any thread.

  private:
    static constexpr size_t NODES = 8192, PLANS = 4;  // More than two graphs have; kinds of layers in a model, or they plan anew.
    std::vector<Node> nodes_ = std::vector<Node>(NODES);
    size_t num_nodes_ = 0, num_plans_ = 0;
    uint64_t step_ = 0;
    std::mutex planning_;
    Plan plans_[PLANS];
};

// How rows of keys or values become floats.
typedef void (*Reader)(const uint8_t* row, int dims, float* to);

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
        case ggml::TYPE_F32: return read_numbers<float>;
        case ggml::TYPE_F16: return read_numbers<f16>;
        case ggml::TYPE_BF16: return read_numbers<bf16>;
        case ggml::TYPE_Q8_0: return read_q8;
        case ggml::TYPE_Q4_0: return read_q4;
        default: return nullptr;
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
        const int step = t.type == ggml::TYPE_Q8_0 || t.type == ggml::TYPE_Q4_0 ? 32 : 16;
        return reader_of(t.type) && t.ne[0] % step == 0 && t.ne[0] <= MOST_DIMS;
    };
    return ggml::params_of<ggml::AttentionParams>(node).max_bias == 0 && node.type == ggml::TYPE_F32 && node.nb[0] == 4 &&
           q.type == ggml::TYPE_F32 && q.nb[0] == 4 && q.ne[0] == k.ne[0] && fits(k) && fits(v) && k.ne[1] == v.ne[1] &&
           k.ne[2] == v.ne[2] && k.ne[2] > 0 && q.ne[2] % k.ne[2] == 0 && q.ne[2] / k.ne[2] <= MOST_LANES &&
           mask.type == ggml::TYPE_F16 && mask.nb[0] == 2 && mask.ne[2] == 1 && mask.ne[0] >= k.ne[1] &&
           mask.ne[1] >= q.ne[1] && (!sinks || sinks->type == ggml::TYPE_F32);
}

// Whether a token of mask b sees what one of mask a does and itself; a window moves on by one.
inline bool follows(const uint16_t* a, const uint16_t* b, int num_cells, bool has_windows) {
    int lost = 0, gained = 0;
    for (int i = 0; i < num_cells; ++i) lost += a[i] != HIDDEN && b[i] == HIDDEN, gained += a[i] == HIDDEN && b[i] != HIDDEN;
    return lost <= has_windows && gained <= 1;
}

inline void make_plan(Plan& plan, const Tensor& node, bool has_windows) {
    const Tensor &q = *node.src[ggml::QUERIES], &k = *node.src[ggml::KEYS], &mask = *node.src[ggml::MASK];
    const int tokens = int(q.ne[1]), num_cells = int(k.ne[1]);
    const auto mask_of = [&](int token) { return (const uint16_t*)mask.at(token, 0); };
    plan.blocks.clear(), plan.cells.clear(), plan.items.clear();
    std::vector<uint16_t> hidden(num_cells);
    const int in_block = std::max(1, MOST_LANES / plan.group), listed = std::max(in_block, MOST_LISTED);
    for (int first = 0, last; first < tokens; first = last) {
        for (last = first + 1; last < tokens && last - first < listed; ++last)
            if (!follows(mask_of(last - 1), mask_of(last), num_cells, has_windows)) break;
        std::fill(hidden.begin(), hidden.end(), 0xffff);
        for (int token = first; token < last; ++token) {
            const uint16_t* const row = mask_of(token);
            for (int i = 0; i < num_cells; ++i) hidden[i] &= row[i] == HIDDEN ? 0xffff : 0;
        }
        const int begin = int(plan.cells.size());
        for (int i = 0; i < num_cells; ++i)
            if (!hidden[i]) plan.cells.push_back(i);
        const int count = int(plan.cells.size()) - begin, shift = has_windows && count ? plan.cells[begin] % PART : 0;
        for (int token = first; token < last; token += in_block)
            plan.blocks.push_back({token, std::min(last, token + in_block), begin, count, shift, 0, 0});
    }
    size_t sums = 0;
    int finished = 0;
    for (Block& block : plan.blocks) {
        block.sums = sums, block.finished = finished;
        const size_t lanes = (size_t(block.tokens()) * plan.group + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        sums += size_t(plan.kv_heads) * block.parts() * lanes * (plan.value_dims + 2);
        finished += plan.kv_heads;
    }
    const bool are_shared = tokens <= SHARED_TOKENS && 4 * sums <= MOST_SHARED;
    for (int b = int(plan.blocks.size()) - 1; b >= 0; --b)  // The last tokens of a prompt see most.
        for (int head = 0; head < plan.kv_heads; ++head) {
            const int parts = plan.blocks[b].parts();
            if (!are_shared || parts == 1) plan.items.push_back({b, head, -1});
            else
                for (int part = 0; part < parts; ++part) plan.items.push_back({b, head, part});
        }
    if (are_shared && plan.sums.size() < sums) plan.sums.resize(sums);
    if (plan.finished.size() < size_t(finished)) plan.finished = std::vector<std::atomic<int>>(finished);
    for (std::atomic<int>& count : plan.finished) count.store(0);
}

// A thread that comes first plans for all.
inline Plan& Attender::plan(const Tensor& node) {
    const int kv_heads = int(node.src[ggml::KEYS]->ne[2]), group = int(node.src[ggml::QUERIES]->ne[2]) / kv_heads;
    const int value_dims = int(node.src[ggml::VALUES]->ne[0]);
    const Tensor* const mask = node.src[ggml::MASK];
    std::lock_guard<std::mutex> alone(planning_);
    for (Plan& plan : plans_)
        if (plan.step == step_ && plan.mask == mask && plan.group == group && plan.kv_heads == kv_heads &&
            plan.value_dims == value_dims)
            return plan;
    Plan& plan = plans_[num_plans_++ % PLANS];
    plan.step = step_, plan.mask = mask, plan.group = group, plan.kv_heads = kv_heads, plan.value_dims = value_dims;
    make_plan(plan, node, has_windows);
    return plan;
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
            read_keys(k.at(tile[i], head), dims, keys + i * key_row);
            read_values(v.at(tile[i], head), value_dims, values + i * value_row);
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

    // What a panel's lanes see of a tile; where that is a part of it, `bias` is what is added to their scores.
    Sight look(int panel, const int32_t* tile, int count) {
        const int first = panel * PANEL, last = std::min(lanes, first + PANEL) - 1;
        bool is_any = false, is_all = count % SHORT == 0;
        for (int token = token_of(first); token <= token_of(last); ++token) {
            const Sight sight = sight_of(token, tile, count);
            is_any |= sight != SEES_NONE, is_all &= sight == SEES_ALL;
        }
        if (!is_any) return SEES_NONE;
        if (is_all) return SEES_ALL;
        for (int lane = 0; lane < PANEL; ++lane) {
            float* const to = bias + lane;
            if (lane && token_of(first + lane) == token_of(first + lane - 1)) {
                for (int i = 0; i < TILE; ++i) to[i * PANEL] = to[i * PANEL - 1];
                continue;
            }
            const uint16_t* const mask = mask_of(token_of(first + lane));
            for (int i = 0; i < TILE; ++i) {
                const uint16_t bits = i < count ? mask[tile[i]] : HIDDEN;
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
            const Floats largest = larger(load(sums.maxima + lane), maxima[j]);
            before[j] = power_of_two(load(sums.maxima + lane) - largest), now[j] = power_of_two(maxima[j] - largest);
            store(sums.maxima + lane, largest);
            store(sums.totals + lane, plus_product(total * now[j], load(sums.totals + lane), before[j]));
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
        const int begin = std::max(block.shift, part * PART), end = std::min(block.shift + block.count, (part + 1) * PART);
        for (int at = begin, next; at < end; at = next) {
            next = std::min(end, (at / TILE + 1) * TILE);
            const int32_t* const tile = plan.cells.data() + block.cells + at - block.shift;
            const int count = next - at;
            bool is_read = false;
            for (int panel = 0; panel < panels; ++panel) {
                const Sight sight = look(panel, tile, count);
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
            const Floats largest = larger(load(whole.maxima + lane), load(part.maxima + lane));
            const Floats before = power_of_two(load(whole.maxima + lane) - largest);
            const Floats now = power_of_two(load(part.maxima + lane) - largest);
            store(whole.maxima + lane, largest);
            store(whole.totals + lane, plus_product(load(part.totals + lane) * now, load(whole.totals + lane), before));
            const size_t first = size_t(lane / PANEL) * PANEL * value_dims + lane % PANEL;
            for (int d = 0; d < value_dims; ++d) {
                float* const to = whole.outputs + first + size_t(d) * PANEL;
                store(to, plus_product(load(part.outputs + first + size_t(d) * PANEL) * now, load(to), before));
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
