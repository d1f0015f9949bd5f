// Attention of one query a sequence. Reading the cache is the limit: what is cached of a head is read once for all queries
// of its group.
#pragma once

#include "values.h"

struct DecodePart {
    int b, first_head, last_head, first_tile, last_tile;  // The heads are those of keys.
    size_t partial;  // Where the scratch holds, of all their queries, maxima, totals, and outputs [ROW]
};

constexpr int TOGETHER = LANES == 16 ? 8 : 4;  // So many heads' outputs are held in registers.

INLINE size_t partial_floats(int queries) { return size_t(queries) * (2 + ROW); }

// Calls work(first, HEADS) for as many heads of a group at a time as registers hold, HEADS as a constant.
template <class F> INLINE void for_heads(int group, F&& work) {
    for (int g = 0; g < group;) {
        const auto step = [&](auto heads) __attribute__((always_inline)) {
            work(g, heads);
            g += heads.value;
        };
        const int left = group - g;
        if (TOGETHER == 8 && left >= 8) step(std::integral_constant<int, TOGETHER>());
        else if (left >= 4) step(std::integral_constant<int, 4>());
        else if (left == 3) step(std::integral_constant<int, 3>());
        else if (left == 2) step(std::integral_constant<int, 2>());
        else step(std::integral_constant<int, 1>());
    }
}

// Scores of HEADS queries with a tile [HEADS][TILE] to weights relative to their largest, which join what was summed before:
// by what that is multiplied, and by what sums of these weights are.
struct HeadSums { float maximum, total; };
template <int HEADS, bool ALL_SEEN>
INLINE void soften(const Attention& a, const Seen& seen, const float* exponents, float* scores, HeadSums* sums, float* before,
                   float* now) {
    const int begin = ALL_SEEN ? 0 : seen.first / LANES * LANES, end = ALL_SEEN ? TILE : seen.end;
    Floats most[HEADS];
    for (int g = 0; g < HEADS; ++g) {
        most[g] = all(UNSEEN);
        for (int k = begin; k < end; k += LANES) {
            Floats score = load(scores + g * TILE + k);
            if (a.softcap) score = capped(a, score, all(exponents[g]));
            if (!ALL_SEEN) {
                Ints place;
                for (int i = 0; i < LANES; ++i) place[i] = k + i;
                score = (place >= all(seen.first)) & (place < all(seen.end)) ? score : all(UNSEEN);
            }
            if (a.softcap || !ALL_SEEN) store(scores + g * TILE + k, score);
            most[g] = larger(most[g], score);
        }
    }
    for (int g = 0; g < HEADS; ++g) most[g] = all(largest(most[g]));
    Ints total[HEADS];
    for (int g = 0; g < HEADS; ++g) {
        const Floats factor = final_exponent(a, all(exponents[g]));
        total[g] = Ints{};
        for (int k = begin; k < end; k += LANES) {
            const Floats weight = power_of_two((load(scores + g * TILE + k) - most[g]) * factor);
            store(scores + g * TILE + k, weight);
            total[g] += rounded(weight * COUNTS);
        }
    }
    for (int g = 0; g < HEADS; ++g) {
        const Joint joint(all(sums[g].maximum), most[g], final_exponent(a, all(exponents[g])));
        sums[g] = {joint.largest[0], joint.of(all(sums[g].total), all(float(sum(total[g]))) * (1 / COUNTS))[0]};
        before[g] = joint.before[0], now[g] = joint.now[0];
    }
}

// One head of the keys for the queries of its group, from tile to tile.
template <int FORMAT> struct DecodeHead {
    KeyHead keys;
    ValueScales scales;
    ScaleUnit units[MOST_DIMS / GROUP];
    float *scores, *exponents, *outputs;  // [group][TILE], [group], [group][ROW]
    int32_t* queries;                     // [group][MOST_DIMS]
    HeadSums* sums;                       // [group]
};

// A tile's scores to weights, and the outputs that take them and the values.
template <int FORMAT>
INLINE void add_tile(const Attention& a, const TilePages& tile, int head, DecodeHead<FORMAT>& of) {
    const Cache& c = a.cache;
    alignas(64) float coefficients[MOST_DIMS / GROUP][TILE];
    for (int g = 0; FORMAT != F16 && g < c.groups(); ++g) {
        of.units[g] = of.scales.unit(g);  // What isn't seen is 0.
        for (int k = 0; k < TILE; k += LANES) store(coefficients[g] + k, load(of.scales.rows[g] + k) * of.units[g].steps);
    }
    for_heads(a.group(), [&](int first, auto heads) __attribute__((always_inline)) {
        float before[heads.value], now[heads.value];
        float* const scores = of.scores + first * TILE;
        const auto run = [&](auto are_all_seen) __attribute__((always_inline)) {
            soften<heads.value, are_all_seen.value>(a, tile.seen, of.exponents + first, scores, of.sums + first, before, now);
        };
        if (tile.seen.is_all()) {
            run(std::true_type());
        } else {
            run(std::false_type());
            const int begin = tile.seen.first / LANES * LANES, end = (tile.seen.end + LANES - 1) / LANES * LANES;
            for (int g = 0; g < heads.value; ++g) {
                std::fill(scores + g * TILE + tile.first_page() * PAGE, scores + g * TILE + begin, 0.0f);
                std::fill(scores + g * TILE + end, scores + g * TILE + tile.end_page() * PAGE, 0.0f);
            }
        }
        add_values<FORMAT, heads.value>(c, tile, head, of.scores + first * TILE, coefficients[0], of.units, before, now,
                                        of.outputs + first * ROW);
    });
}

// Scores of a tile, and the scales of its values. A page's turns are made once for all heads.
template <int FORMAT>
INLINE void score_tile(const Attention& a, const DecodePart& part, int tile, const TilePages& read, Turns<FORMAT>& turns,
                       DecodeHead<FORMAT>* of_heads) {
    const Cache& c = a.cache;
    const Order<FORMAT> order = turns.order;
    const int count = part.last_head - part.first_head;
    for (int i = 0; FORMAT != F16 && !read.seen.is_all() && i < count; ++i) of_heads[i].scales.clear(c.groups());
    for (int page = read.first_page(); page < read.end_page(); ++page) {
        if (order.half) turns.turn(a.page_angles(part.b, tile * TILE_PAGES + page));
        for (int i = 0; i < count; ++i) {
            DecodeHead<FORMAT>& of = of_heads[i];
            alignas(64) float key_units[PAGE];
            const int head = part.first_head + i, place = page * PAGE;
            if (tile == part.first_tile && page + 1 < read.end_page())  // Of later tiles values.h has asked for the keys.
                fetch(c, c.key_codes, c.key_scales, read.pages[page + 1], head);
            fetch_scales(c, c.value_scales, read.pages[page], head);
            const uint8_t* const values = c.value_codes + c.token(read.pages[page], head) * c.code_bytes();
            const KeyPage<FORMAT> keys(c, read.pages[page], head);
            for_heads(a.group(), [&](int g, auto heads) __attribute__((always_inline)) {
                score_page<FORMAT, heads.value>(keys, order, of.keys, turns, of.queries + g * MOST_DIMS, values, key_units,
                                                of.scores + g * TILE + place);
            });
            if constexpr (FORMAT != F16)
                of.scales.read(c, read.pages[page], head, place, std::max(0, read.seen.first - place),
                               std::min(PAGE, read.seen.end - place), key_units);
        }
    }
}

template <int FORMAT> static void decode_part(const Attention& a, const DecodePart& part, float* partial) {
    const Cache& c = a.cache;
    const int group = a.group(), half = a.rope.half, position = a.step.context_lens[part.b] - 1;
    const int count = part.last_head - part.first_head, num_queries = count * group;
    const Order<FORMAT> order{c.dims, half};
    float* const outputs = partial + 2 * num_queries;
    std::fill_n(outputs, num_queries * ROW, 0.0f);

    // The first keys are on their way while the queries are prepared.
    const int first_page = part.first_tile * TILE_PAGES + Seen(a, position, part.first_tile).first / PAGE;
    for (int i = 0; i < count; ++i) fetch(c, c.key_codes, c.key_scales, a.pages(part.b)[first_page], part.first_head + i);

    static thread_local std::vector<DecodeHead<FORMAT>> kept;
    if (int(kept.size()) < count) kept.resize(count);
    DecodeHead<FORMAT>* const of_heads = kept.data();
    static thread_local Scratch memory;
    float* at = memory.floats(size_t(num_queries) * (MOST_DIMS + TILE + 3));
    const auto take = [&](size_t floats) { return at += floats, at - floats; };
    float* const scores = take(size_t(num_queries) * TILE);
    int32_t* const queries = (int32_t*)take(size_t(num_queries) * MOST_DIMS);
    float* const exponents = take(num_queries);
    HeadSums* const sums = (HeadSums*)take(2 * num_queries);
    Turns<FORMAT>& turns = kept_turns<FORMAT>();
    turns.order = order;
    if (half) turns.start(a.place_angles(part.b));
    for (int i = 0; i < count; ++i) {
        DecodeHead<FORMAT>& of = of_heads[i];
        const int first = i * group, head = part.first_head + i;
        of.keys = KeyHead(c, head, half);
        of.scores = scores + first * TILE, of.exponents = exponents + first, of.outputs = outputs + first * ROW;
        of.queries = queries + first * MOST_DIMS, of.sums = sums + first;
        for (int g = 0; g < group; ++g) {
            const size_t row = size_t(a.step.query_starts[part.b]) * a.heads + head * group + g;
            of.exponents[g] =
                order.arrange(a.queries + row * c.dims, of.keys.of_query, a.scale, of.queries + g * MOST_DIMS, 1);
            of.sums[g] = {UNSEEN, 0};
        }
    }

    for (int tile = part.first_tile; tile < part.last_tile; ++tile) {
        const Seen seen(a, position, tile);
        const int32_t* const pages = a.pages(part.b) + tile * TILE_PAGES;
        const int later = tile + 1 == part.last_tile ? 0 : position / PAGE + 1 - (tile + 1) * TILE_PAGES;
        const TilePages read{pages, pages + TILE_PAGES, std::min(TILE_PAGES, later), seen};
        score_tile(a, part, tile, read, turns, of_heads);
        for (int i = 0; i < count; ++i) add_tile(a, read, part.first_head + i, of_heads[i]);
    }
    for (int q = 0; q < num_queries; ++q) {
        partial[q] = sums[q].maximum * final_exponent(a, all(exponents[q]))[0];
        partial[num_queries + q] = sums[q].total;
    }
}

// Parts [first, last) are those of one sequence's heads.
static void merge_parts(const Attention& a, const DecodePart* first, const DecodePart* last, const float* scratch) {
    const int dims = a.cache.dims, num_queries = (first->last_head - first->first_head) * a.group();
    for (int q = 0; q < num_queries; ++q) {
        alignas(64) float weighted[ROW] = {};
        Floats maximum = all(NOTHING), total = {};
        for (const DecodePart* part = first; part < last; ++part) {
            const float* const partial = scratch + part->partial;
            const float* const output = partial + 2 * num_queries + q * ROW;
            const Joint joint(maximum, all(partial[q]), all(1.0f));
            total = joint.of(total, all(partial[num_queries + q]));
            for (int d = 0; d < dims; d += LANES) store(weighted + d, joint.of(load(weighted + d), load(output + d)));
            maximum = joint.largest;
        }
        const size_t head = size_t(a.step.query_starts[first->b]) * a.heads + first->first_head * a.group() + q;
        for (int d = 0; d < dims; ++d) a.out[head * dims + d] = weighted[d] / total[0];
    }
}
