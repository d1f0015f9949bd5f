// A step's attention cut into tasks: parts of contexts for decoding sequences, blocks of queries for the others.
#pragma once

#include "decode.h"
#include "prefill.h"

constexpr int TASKS_A_THREAD = 3;  // So many let threads end at about the same time.

// Parts of the same heads of a sequence follow each other; `runs` tells where the first of each are, and where the last end.
// A task of several heads turns to a page's place once for all of them.
INLINE void plan_decode(const Attention& a, std::vector<DecodePart>& parts, std::vector<size_t>& runs) {
    const auto is_decode = [&](int b) { return a.step.query_starts[b + 1] - a.step.query_starts[b] == 1; };
    const auto first_tile = [&](int b) { return a.first_seen(a.step.context_lens[b] - 1) / TILE; };
    const auto end_tile = [&](int b) { return (a.step.context_lens[b] + TILE - 1) / TILE; };
    int whole = 0;  // So many tasks are there of all heads.
    for (int b = 0; b < a.step.sequences; ++b)
        if (is_decode(b)) whole += (end_tile(b) + PART_TILES - 1) / PART_TILES - first_tile(b) / PART_TILES;
    if (!whole) return;
    const int kv_heads = a.cache.kv_heads, wanted = (pool().threads() * TASKS_A_THREAD + whole - 1) / whole;
    const int heads = pool().threads() == 1 ? kv_heads : (kv_heads + wanted - 1) / wanted;
    for (int b = 0; b < a.step.sequences; ++b) {
        if (!is_decode(b)) continue;
        for (int head = 0; head < kv_heads; head += heads) {
            const int last_head = std::min(kv_heads, head + heads);
            runs.push_back(parts.size());
            for (int tile = first_tile(b); tile < end_tile(b);) {
                const int last = std::min(end_tile(b), (tile / PART_TILES + 1) * PART_TILES);
                const size_t floats = partial_floats(a.group() * heads);
                parts.push_back({b, head, last_head, tile, last, parts.size() * floats});
                tile = last;
            }
        }
    }
    runs.push_back(parts.size());
}

// Blocks are so many that all threads have the same to do, where that leaves a panel or more to each.
INLINE void plan_prefill(const Attention& a, std::vector<PrefillBlock>& blocks) {
    const int most = std::max(1, BLOCK_QUERIES / a.group()), threads = pool().threads();
    for (int b = 0; b < a.step.sequences; ++b) {
        const int count = a.step.query_starts[b + 1] - a.step.query_starts[b];
        if (count < 2) continue;
        const int least = (count + most - 1) / most;
        int even = least;
        while (even * a.cache.kv_heads % threads) ++even;
        const int wanted = count * a.group() >= even * PANEL ? even : least, rows = (count + wanted - 1) / wanted;
        // the last rows see the most: first, so that the short ones fill the gaps in the end
        for (int row = (count - 1) / rows * rows; row >= 0; row -= rows)
            for (int head = 0; head < a.cache.kv_heads; ++head)
                blocks.push_back({b, head, row, std::min(row + rows, count)});
    }
}

template <int FORMAT> static void attention(const Attention& a) {
    std::vector<DecodePart> parts;
    std::vector<PrefillBlock> blocks;
    std::vector<size_t> runs;
    plan_decode(a, parts, runs);
    plan_prefill(a, blocks);
    static thread_local Scratch memory;
    float* const partials = memory.floats(parts.size() * partial_floats(a.heads));
    const int num_blocks = int(blocks.size());
    pool().run(num_blocks + int(parts.size()), [&](int task) {
        if (task < num_blocks) return prefill_block<FORMAT>(a, blocks[task]);
        const DecodePart& part = parts[task - num_blocks];
        decode_part<FORMAT>(a, part, partials + part.partial);
    });
    for (size_t i = 0; i + 1 < runs.size(); ++i)
        merge_parts(a, parts.data() + runs[i], parts.data() + runs[i + 1], partials);
}

void attention(const Attention& a) {
    if (a.cache.format == F16) attention<F16>(a);
    if (a.cache.format == Q8) attention<Q8>(a);
    if (a.cache.format == Q4) attention<Q4>(a);
}
