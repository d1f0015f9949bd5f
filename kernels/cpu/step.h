// A step's attention cut into tasks: parts of contexts for decoding sequences, blocks of queries for the others.
#pragma once

#include "decode.h"
#include "prefill_words.h"

constexpr int PART_PAGES = 8;      // A decoding task is no smaller.
constexpr int TASKS_A_THREAD = 6;  // So many let threads end at about the same time.

INLINE void plan_decode(const Attention& a, std::vector<DecodePart>& parts, std::vector<size_t>& sequences) {
    size_t pages = 0;
    const auto is_decode = [&](int b) { return a.step.query_starts[b + 1] - a.step.query_starts[b] == 1; };
    const auto first_page = [&](int b) { return a.first_seen(a.step.context_lens[b] - 1) / PAGE; };
    const auto end_page = [&](int b) { return (a.step.context_lens[b] + PAGE - 1) / PAGE; };
    for (int b = 0; b < a.step.sequences; ++b)
        if (is_decode(b)) pages += end_page(b) - first_page(b);
    const int most = std::max<int>(PART_PAGES, int(pages / (pool().threads() * TASKS_A_THREAD)) + 1);
    for (int b = 0; b < a.step.sequences; ++b) {
        if (!is_decode(b)) continue;
        sequences.push_back(parts.size());
        for (int page = first_page(b); page < end_page(b); page += most)
            parts.push_back({b, page, std::min(page + most, end_page(b)), parts.size() * partial_floats(a.heads)});
    }
    sequences.push_back(parts.size());
}

INLINE void plan_prefill(const Attention& a, int block_queries, std::vector<PrefillBlock>& blocks) {
    const int rows = std::max(1, block_queries / a.group());
    for (int b = 0; b < a.step.sequences; ++b) {
        const int count = a.step.query_starts[b + 1] - a.step.query_starts[b];
        if (count < 2) continue;
        // the last rows see the most: first, so that the short ones fill the gaps in the end
        for (int row = (count - 1) / rows * rows; row >= 0; row -= rows)
            for (int head = 0; head < a.cache.kv_heads; ++head)
                blocks.push_back({b, head, row, std::min(row + rows, count)});
    }
}

// How blocks of queries are attended.
struct Prefill {
    int block_queries;
    void (*attend)(const Attention& a, const PrefillBlock& block);
};
template <int FORMAT> constexpr Prefill prefill() {
#if defined(__AVX512VNNI__)
    if constexpr (FORMAT != F16) return {WORD_QUERIES, prefill_words<FORMAT>};
#endif
    return {BLOCK_QUERIES, prefill_block<FORMAT>};
}

template <int FORMAT> static void attention(const Attention& a) {
    std::vector<DecodePart> parts;
    std::vector<PrefillBlock> blocks;
    std::vector<size_t> sequences;  // Parts sequences[i] .. sequences[i + 1] are of one.
    plan_decode(a, parts, sequences);
    plan_prefill(a, prefill<FORMAT>().block_queries, blocks);
    static thread_local Scratch memory;
    float* const partials = memory.floats(parts.size() * partial_floats(a.heads));
    const int num_blocks = int(blocks.size());
    pool().run(num_blocks + int(parts.size()), [&](int task) {
        if (task < num_blocks) return prefill<FORMAT>().attend(a, blocks[task]);
        const DecodePart& part = parts[task - num_blocks];
        decode_part<FORMAT>(a, part, partials + part.partial);
    });
    for (size_t i = 0; i + 1 < sequences.size(); ++i)
        merge_parts(a, parts.data() + sequences[i], parts.data() + sequences[i + 1], partials);
}

void attention(const Attention& a) {
    if (a.cache.format == F16) attention<F16>(a);
    if (a.cache.format == Q8) attention<Q8>(a);
    if (a.cache.format == Q4) attention<Q4>(a);
}
