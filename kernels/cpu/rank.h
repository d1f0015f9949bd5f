// The largest logits of a row, in order, without sorting a vocabulary.
#pragma once

#include "logits.h"

namespace drawing {

// A token and its logit in one number: of two, the smaller is the larger logit, of equals the lower id.
typedef uint64_t Entry;

inline Entry entry_of(float logit, int64_t token_id) {
    const float value = logit + 0.0f;  // This makes 0 of -0.
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;  // Now they rise with the float.
    return Entry(~bits) << 32 | uint32_t(token_id);
}
inline int64_t token_of(Entry entry) { return int64_t(entry & 0xffffffffu); }
inline float logit_of(Entry entry) {
    uint32_t bits = ~uint32_t(entry >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

struct Ranked {
    std::vector<float> maxima, order;
    std::vector<uint32_t> counts;
    std::vector<Entry> list, other;  // The list has the largest logits, descending, equals by id.
    float top = 0;                   // The row's largest logit; not finite where nothing can be drawn.
    float border = 0;                // No token that isn't listed has a larger logit; -inf: all are listed.
};

// Sorts a list whose equals stand in the order of their ids already.
inline void sort_entries(Ranked& ranked) {
    std::vector<Entry>& list = ranked.list;
    if (list.size() < 512) {
        std::sort(list.begin(), list.end());
        return;
    }
    ranked.other.resize(list.size());
    for (int shift = 32; shift < 64; shift += 11) {  // The lowest digit comes first; each pass keeps the order of equals.
        const uint32_t last = (1u << std::min(11, 64 - shift)) - 1;
        ranked.counts.assign(last + 2, 0);
        for (Entry entry : list) ++ranked.counts[((entry >> shift) & last) + 1];
        for (uint32_t digit = 1; digit <= last; ++digit) ranked.counts[digit] += ranked.counts[digit - 1];
        for (Entry entry : list) ranked.other[ranked.counts[(entry >> shift) & last]++] = entry;
        list.swap(ranked.other);
    }
}

// List tokens of at least the logit that `num_blocks` blocks reach: as many tokens, or more.
inline void list_by_blocks(const float* row, int64_t vocab, int64_t num_blocks, Ranked& ranked) {
    ranked.order = ranked.maxima;
    std::nth_element(ranked.order.begin(), ranked.order.begin() + (num_blocks - 1), ranked.order.end(),
                     std::greater<float>());
    const float least = std::max(ranked.order[num_blocks - 1], -std::numeric_limits<float>::max());
    for (size_t block = 0; block < ranked.maxima.size(); ++block) {
        if (!(ranked.maxima[block] >= least)) continue;
        const int64_t end = std::min(vocab, int64_t(block + 1) * BLOCK);
        for (int64_t i = int64_t(block) * BLOCK; i < end; ++i)
            if (row[i] >= least) ranked.list.push_back(entry_of(row[i], i));
    }
}

// How many blocks to look into, so that a third more tokens than wanted are found if they lie anywhere; 0: too many.
inline int64_t blocks_for(int64_t wanted, int64_t num_blocks) {
    if (wanted * 4 <= num_blocks) return wanted;
    const int64_t likely = std::ceil(num_blocks * -std::expm1(-4.0 / 3 * double(wanted) / double(num_blocks)));
    return likely < num_blocks ? likely : 0;
}

// The same by counting how many logits begin with which twelve bits.
inline void list_by_digits(const float* row, int64_t vocab, int64_t wanted, Ranked& ranked) {
    ranked.counts.assign(4096, 0);
    for (int64_t i = 0; i < vocab; ++i) ++ranked.counts[entry_of(row[i], 0) >> 52];
    int64_t reached = 0;
    Entry limit = 0;
    while (limit < 4095 && reached + ranked.counts[limit] < wanted) reached += ranked.counts[limit++];
    for (int64_t i = 0; i < vocab; ++i) {
        const Entry entry = entry_of(row[i], i);
        if (entry >> 52 <= limit && row[i] > -INF) ranked.list.push_back(entry);
    }
}

// The maxima and the top of a row; false where nothing can be drawn from it.
inline bool look_at(const float* row, int64_t vocab, Ranked& ranked) {
    const bool is_whole = block_maxima(row, vocab, ranked.maxima);
    ranked.top = is_whole ? *std::max_element(ranked.maxima.begin(), ranked.maxima.end()) : NAN;
    return std::isfinite(ranked.top);
}

// List the `wanted` largest logits of a row that was looked at; fewer where no more are possible.
inline void rank(const float* row, int64_t vocab, int64_t wanted, Ranked& ranked) {
    ranked.list.clear();
    if (const int64_t num_blocks = blocks_for(wanted, int64_t(ranked.maxima.size())))
        list_by_blocks(row, vocab, num_blocks, ranked);
    if (int64_t(ranked.list.size()) < wanted) {
        ranked.list.clear();
        list_by_digits(row, vocab, wanted, ranked);
    }
    sort_entries(ranked);
    ranked.border = -INF;
    if (wanted < vocab && int64_t(ranked.list.size()) >= wanted) {
        ranked.list.resize(wanted);
        ranked.border = logit_of(ranked.list.back());
    }
}

}  // namespace drawing
