#include "draw.h"
#include "search.h"
#include "units.h"

// A token for each of these rows of logits, -1 where nothing can be drawn. See drawing::Params.
EXPORT void tightrope_draw(const float* logits, int64_t vocab, const int64_t* rows, int64_t count, const double* params,
                           int64_t* token_ids) {
    drawing::draw(logits, vocab, rows, count, params, token_ids);
}

EXPORT void tightrope_rank(const float* logits, int64_t vocab, const int64_t* rows, int64_t count,
                           const int64_t* wanted, int64_t width, float* out_logits, int64_t* out_ids, float* borders,
                           float* tops) {
    drawing::rank_rows(logits, vocab, rows, count, wanted, width, out_logits, out_ids, borders, tops);
}

EXPORT void tightrope_row_sums(const float* logits, int64_t vocab, const int64_t* rows, int64_t count,
                               const double* transforms, int is_mass_alone, double* sums) {
    drawing::sum_rows(logits, vocab, rows, count, transforms, is_mass_alone, sums);
}

EXPORT void tightrope_search_file(int file, int64_t start, int64_t bytes, void* buffer, int64_t room,
                                  const search::Masks* masks, search::Result* result) {
    *result = search::in_file(*masks, file, start, bytes, (uint8_t*)buffer, room);
}
