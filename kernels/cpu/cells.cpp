// What llama.cpp's steps call of ours.

#include <memory>

#include "cells.h"
#include "units.h"

// For ggml as a node's work; `what` is one of an attender's nodes.
EXPORT void tightrope_attend(ggml::Tensor* node, int thread, int threads, void* what) {
    cells::attend(node, thread, threads, what);
}

// For one context of the ggml that made these samples, with tightrope_attend as their work; null where that is laid out
// otherwise. has_windows: some layers of the model look back a number of tokens only.
EXPORT void* tightrope_new_attender(const ggml::Samples* samples, int has_windows) {
    auto attender = std::make_unique<cells::Attender>(has_windows != 0);
    return ggml::recognize(*samples, attender->operations) ? attender.release() : nullptr;
}
EXPORT void tightrope_free_attender(void* attender) { delete (cells::Attender*)attender; }

// For llama.cpp as its callback of evaluation: it shows all nodes of a graph before they are computed. Of those it asks
// whether they are to be shown again; none is.
EXPORT bool tightrope_take_attention(ggml::Tensor* node, bool is_asked, void* attender) {
    if (is_asked) ((cells::Attender*)attender)->take(*node);
    return false;
}
