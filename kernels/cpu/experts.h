// A mixture of experts in one call: each expert that some token picked, for all its tokens together.
#pragma once

#include "layer.h"

// The `each` experts of every token, and what share of their output it takes: [T, each] both.
struct Picks {
    const int64_t* experts;
    const float* shares;
    int tokens, each;
};

// out [T, K]: the shares of what the picked experts make of x [T, K]. `adapted` tells, with the slots and scales of T
// tokens, of gate_up and down of the first expert, of those of the second, and so on.
static void experts(const Experts& e, const Picks& picks, const Adapted& adapted, const float* x, float* out) {
    const int hidden = e.gate_up[0].inputs, middle = e.down[0].inputs, places = picks.tokens * picks.each;
    std::fill_n(out, size_t(picks.tokens) * hidden, 0.0f);
    static thread_local std::vector<int> starts, order, slots_of;
    static thread_local std::vector<float> scales_of;
    starts.assign(e.count + 1, 0);
    for (int i = 0; i < places; ++i) ++starts[picks.experts[i] + 1];
    int most = 0;
    for (int i = 0; i < e.count; ++i) {
        most = std::max(most, starts[i + 1]);
        starts[i + 1] += starts[i];
    }
    order.resize(places);  // Places by expert; filling it moves each start to the next one's.
    for (int i = 0; i < places; ++i) order[starts[picks.experts[i]]++] = i;
    if (adapted.uses.count) slots_of.resize(most), scales_of.resize(most);

    static thread_local Scratch memory;
    float* const rows = memory.floats(size_t(most) * (2 * size_t(hidden) + 3 * size_t(middle)));
    float* const gate_up = rows + size_t(most) * hidden;
    float* const gates = gate_up + size_t(most) * 2 * middle;
    float* const mixed = gates + size_t(most) * middle;
    for (int i = 0, begin = 0; i < e.count; begin = starts[i++]) {
        const int count = starts[i] - begin;
        if (!count) continue;
        Adapted mine = adapted;
        mine.uses.slots = slots_of.data(), mine.uses.scales = scales_of.data();
        for (int r = 0; r < count; ++r) {
            const int token = order[begin + r] / picks.each;
            std::copy_n(x + size_t(token) * hidden, hidden, rows + size_t(r) * hidden);
            if (adapted.uses.count) slots_of[r] = adapted.uses.slots[token], scales_of[r] = adapted.uses.scales[token];
        }
        project(e.gate_up[i], mine, 2 * i, rows, gate_up, count);
        gated(e.activation, gate_up, gates, count, middle);
        project(e.down[i], mine, 2 * i + 1, gates, mixed, count);
        for (int r = 0; r < count; ++r) {
            const int place = order[begin + r];
            float* const to = out + size_t(place / picks.each) * hidden;
            const float share = picks.shares[place], *const from = mixed + size_t(r) * hidden;
            for (int k = 0; k < hidden; ++k) to[k] += share * from[k];
        }
    }
}
