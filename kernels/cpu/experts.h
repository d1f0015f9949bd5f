// A mixture of experts in one call: each expert that some token picked, for all its tokens together.
#pragma once

#include "layer.h"

// The `each` experts of every token, and what share of their output it takes: [T, each] both.
struct Picks {
    const int64_t* experts;
    const float* shares;
    int tokens, each;
};

// out [T, outputs of down]: the shares of what the picked experts make of x [T, K]. `adapted` tells, with the slots and
// scales of T tokens, of gate_up and down of the first expert, of those of the second, and so on.
//
// Where ranks gather what lies between an expert's products, it takes two calls, which have it in `between`, expert
// after expert: one without `out` writes a rank's columns [T * each, outputs of gate_up / 2], one without x reads those of
// all ranks, [T * each, inputs of down].
static void experts(const Experts& e, const Picks& picks, const Adapted& adapted, const float* x, float* between,
                    float* out) {
    const int hidden = e.gate_up[0].inputs, own = e.gate_up[0].outputs / 2, places = picks.tokens * picks.each;
    const int middle = e.down[0].inputs, outputs = e.down[0].outputs;
    if (out) std::fill_n(out, size_t(picks.tokens) * outputs, 0.0f);
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
    float* const rows = memory.floats(size_t(most) * (size_t(hidden) + 3 * size_t(own) + outputs));
    float* const gate_up = rows + size_t(most) * hidden;
    float* const gates = gate_up + size_t(most) * 2 * own;
    float* const mixed = gates + size_t(most) * own;
    for (int i = 0, begin = 0; i < e.count; begin = starts[i++]) {
        const int count = starts[i] - begin;
        if (!count) continue;
        Adapted mine = adapted;
        mine.uses.slots = slots_of.data(), mine.uses.scales = scales_of.data();
        for (int r = 0; r < count; ++r) {
            const int token = order[begin + r] / picks.each;
            if (x) std::copy_n(x + size_t(token) * hidden, hidden, rows + size_t(r) * hidden);
            if (adapted.uses.count) slots_of[r] = adapted.uses.slots[token], scales_of[r] = adapted.uses.scales[token];
        }
        float* const gated_rows = between ? between + size_t(begin) * (x ? own : middle) : gates;
        if (x) {
            project(e.gate_up[i], mine, 2 * i, rows, gate_up, count);
            gated(e.activation, gate_up, gated_rows, count, own);
        }
        if (!out) continue;
        project(e.down[i], mine, 2 * i + 1, gated_rows, mixed, count);
        for (int r = 0; r < count; ++r) {
            const int place = order[begin + r];
            float* const to = out + size_t(place / picks.each) * outputs;
            const float share = picks.shares[place], *const from = mixed + size_t(r) * outputs;
            for (int k = 0; k < outputs; ++k) to[k] += share * from[k];
        }
    }
}
