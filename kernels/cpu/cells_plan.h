// What a step's tokens see of llama.cpp's cells, and how threads share the work.
//
// A list holds the cells of tokens that follow one another in a sequence, in order. Lists that begin alike, as those of
// sequences do that share a prompt, have a block together: what they have in common is read for all of them at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "ggml.h"
#include "simd.h"

namespace cells {

using ggml::Tensor;

constexpr int TILE = 64;                // Cells between two corrections of the softmax.
constexpr int PART = 16 * TILE;         // Cells whose sums are their own.
constexpr int MOST_LANES = 8 * LANES;   // Queries of a block.
constexpr int MOST_LISTED = 64;         // Tokens of a list; blocks of fewer have one together.
constexpr int LEAST_COMMON = 4 * TILE;  // Cells that sequences begin with alike, to have a block together.
constexpr int SHARED_TOKENS = 32;       // In steps of so many, or fewer, threads share the parts of a block,
constexpr size_t MOST_SHARED = size_t(64) << 20;  // unless their sums have more bytes.
constexpr uint16_t HIDDEN = 0xfc00;               // -infinity, as float16

// Tokens first .. last, and cells that they see, perhaps not all of them; `place` is where these stand in their order.
struct List {
    int first, last, cells, count, place;  // `cells` of Plan::cells.
};

// Tokens whose queries are computed together: those of lists that are the plan's, which end at place `end`.
struct Block {
    int first, last, lists, num_lists, end;
    int finished = 0;  // Of Plan::finished, for its first head.
    size_t sums = 0;   // Where its first head's parts have theirs.

    int tokens() const { return last - first; }
    int parts() const { return std::max(1, (end + PART - 1) / PART); }
};

struct Item { int block, head, part; };  // part: -1 for all of them.

// What a step's nodes with the same mask, and heads alike, have in common.
struct Plan {
    uint64_t step = 0;
    const Tensor* mask = nullptr;
    int group = 0, kv_heads = 0, value_dims = 0;
    std::vector<int32_t> cells;
    std::vector<List> lists;
    std::vector<Block> blocks;
    std::vector<Item> items;
    std::vector<std::atomic<int>> finished;
    std::vector<float> sums;

    void list_cells(const Tensor& mask, int tokens, int num_cells, bool has_windows);
    void form_blocks();
    void share(int tokens);

  private:
    std::vector<List> found_;

    int in_common(const List& a, const List& b) const;
    void join(size_t first, size_t last, int common);
};

// Whether a token of mask b sees what one of mask a does and itself; a window moves on by one.
inline bool follows(const uint16_t* a, const uint16_t* b, int num_cells, bool has_windows) {
    int lost = 0, gained = 0;
    for (int i = 0; i < num_cells; ++i) lost += a[i] != HIDDEN && b[i] == HIDDEN, gained += a[i] == HIDDEN && b[i] != HIDDEN;
    return lost <= has_windows && gained <= 1;
}

inline void Plan::list_cells(const Tensor& mask, int tokens, int num_cells, bool has_windows) {
    const auto mask_of = [&](int token) { return (const uint16_t*)mask.at(token, 0); };
    const int most = std::max(MOST_LANES / group, MOST_LISTED);
    std::vector<uint16_t> hidden(num_cells);
    cells.clear(), found_.clear();
    for (int first = 0, last; first < tokens; first = last) {
        for (last = first + 1; last < tokens && last - first < most; ++last)
            if (!follows(mask_of(last - 1), mask_of(last), num_cells, has_windows)) break;
        std::fill(hidden.begin(), hidden.end(), 0xffff);
        for (int token = first; token < last; ++token) {
            const uint16_t* const row = mask_of(token);
            for (int i = 0; i < num_cells; ++i) hidden[i] &= row[i] == HIDDEN ? 0xffff : 0;
        }
        const int begin = int(cells.size());
        for (int i = 0; i < num_cells; ++i)
            if (!hidden[i]) cells.push_back(i);
        const int count = int(cells.size()) - begin;
        found_.push_back({first, last, begin, count, has_windows && count ? cells[begin] % PART : 0});
    }
}

// Cells that two lists begin with alike, in whole tiles.
inline int Plan::in_common(const List& a, const List& b) const {
    if (a.place != b.place) return 0;
    const int32_t *const of_a = cells.data() + a.cells, *const of_b = cells.data() + b.cells;
    const int alike = int(std::mismatch(of_a, of_a + std::min(a.count, b.count), of_b).first - of_a);
    return std::max(0, (a.place + alike) / TILE * TILE - a.place);
}

// Have lists first .. last of those found in a block, with what they have in common as a list of its own.
inline void Plan::join(size_t first, size_t last, int common) {
    const List& head = found_[first];
    Block block{head.first, found_[last - 1].last, int(lists.size()), 0, 0};
    if (common) lists.push_back({block.first, block.last, head.cells, common, head.place});
    for (size_t i = first; i < last; ++i) {
        const List& list = found_[i];
        block.end = std::max(block.end, list.place + list.count);
        if (list.count > common)
            lists.push_back({list.first, list.last, list.cells + common, list.count - common, list.place + common});
    }
    block.num_lists = int(lists.size()) - block.lists;
    blocks.push_back(block);
}

inline void Plan::form_blocks() {
    const int most = std::max(1, MOST_LANES / group);
    blocks.clear(), lists.clear();
    for (size_t first = 0, last; first < found_.size(); first = last) {
        const List list = found_[first];
        int common = list.count;
        for (last = first + 1; last < found_.size() && found_[last].last - list.first <= most; ++last) {
            const int less = std::min(common, in_common(list, found_[last]));
            if (less < LEAST_COMMON || (last > first + 1 && less < common / 2)) break;
            common = less;
        }
        if (last > first + 1) {
            join(first, last, common);
            continue;
        }
        for (int token = list.first; token < list.last; token += most) {
            const int end = std::min(list.last, token + most);
            blocks.push_back({token, end, int(lists.size()), 1, list.place + list.count});
            lists.push_back({token, end, list.cells, list.count, list.place});
        }
    }
}

inline void Plan::share(int tokens) {
    size_t num_sums = 0;
    int num_finished = 0;
    for (Block& block : blocks) {
        block.sums = num_sums, block.finished = num_finished;
        const size_t lanes = (size_t(block.tokens()) * group + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        num_sums += size_t(kv_heads) * block.parts() * lanes * (value_dims + 2);
        num_finished += kv_heads;
    }
    const bool are_shared = tokens <= SHARED_TOKENS && 4 * num_sums <= MOST_SHARED;
    items.clear();
    for (int b = int(blocks.size()) - 1; b >= 0; --b)  // The last tokens of a prompt see most.
        for (int head = 0; head < kv_heads; ++head) {
            const int parts = blocks[b].parts();
            if (!are_shared || parts == 1) items.push_back({b, head, -1});
            else
                for (int part = 0; part < parts; ++part) items.push_back({b, head, part});
        }
    if (are_shared && sums.size() < num_sums) sums.resize(num_sums);
    if (finished.size() < size_t(num_finished)) finished = std::vector<std::atomic<int>>(num_finished);
    for (std::atomic<int>& count : finished) count.store(0);
}

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
    const int tokens = int(node.src[ggml::QUERIES]->ne[1]);
    plan.list_cells(*mask, tokens, int(node.src[ggml::KEYS]->ne[1]), has_windows);
    plan.form_blocks();
    plan.share(tokens);
    return plan;
}

}  // namespace cells
