// Work shared among threads, and memory that several of them use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace atedm {

// Calls body(context, worker, item) for every item; `worker` < threads names the scratch memory of the running thread.
// Any thread may run any item, so a result must not depend on which one does.
void run_parallel(int32_t threads, int64_t items, void (*body)(void *, int32_t, int64_t), void *context);

// Memory aligned for any vector and, if large, for huge pages; NULL if there is not enough. It is not cleared.
void *allocate(size_t bytes);
void release(void *memory);

}  // namespace atedm
