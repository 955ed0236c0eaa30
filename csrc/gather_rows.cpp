// Copies of whole rows. The code is the same for every ISA and for all dtypes of one size.
#include <cstring>

#include "atedm.h"
#include "parallel.h"

namespace {

constexpr int64_t kItemRows = 64;

struct Gather {
  const char *x;
  const int64_t *x_stride, *index, *index_stride;
  int64_t length, channels, bytes, rows, items;
  char *out;

  void copy(int64_t b, int64_t r) const {
    int64_t row;
    std::memcpy(&row, index + b * index_stride[0] + r * index_stride[1], sizeof(row));
    row = row < 0 ? 0 : row >= length ? length - 1 : row;
    const char *from = x + (b * x_stride[0] + row * x_stride[1]) * bytes;
    char *to = out + (b * rows + r) * channels * bytes;
    const int64_t step = x_stride[2] * bytes;
    if (x_stride[2] == 1) {
      std::memcpy(to, from, static_cast<size_t>(channels * bytes));
    } else if (bytes == 2) {
      for (int64_t c = 0; c < channels; ++c) std::memcpy(to + c * 2, from + c * step, 2);
    } else {
      for (int64_t c = 0; c < channels; ++c) std::memcpy(to + c * 4, from + c * step, 4);
    }
  }

  static void run(void *context, int32_t, int64_t item) {
    const Gather &self = *static_cast<const Gather *>(context);
    const int64_t b = item / self.items, first = item % self.items * kItemRows;
    for (int64_t r = first; r < first + kItemRows && r < self.rows; ++r) self.copy(b, r);
  }
};

}  // namespace

extern "C" int32_t atedm_gather_rows(const void *x, const int64_t x_stride[3], int64_t batch, int64_t length,
                                     int64_t channels, int32_t element_bytes, const int64_t *index,
                                     const int64_t index_stride[2], int64_t rows, void *out, int32_t threads) {
  if ((element_bytes != 2 && element_bytes != 4) || batch < 0 || channels < 0 || rows < 0) return ATEDM_INVALID;
  if (batch * channels * rows == 0) return ATEDM_OK;
  if (length <= 0) return ATEDM_INVALID;  // nothing to copy from
  Gather gather{static_cast<const char *>(x), x_stride, index,    index_stride,
                length,                       channels, element_bytes, rows,
                (rows + kItemRows - 1) / kItemRows,     static_cast<char *>(out)};
  const int64_t worth = batch * rows * channels * element_bytes / (1 << 19) + 1;  // one thread per half megabyte
  atedm::run_parallel(worth < threads ? static_cast<int32_t>(worth) : threads, batch * gather.items, Gather::run,
                      &gather);
  return ATEDM_OK;
}
