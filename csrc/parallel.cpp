#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#include "atedm.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace atedm {
namespace {

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<long> gomp_process{0};

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

struct Job {
  std::atomic<int64_t> next_item{0};
  std::atomic<int32_t> next_worker{0};
  int64_t items;
  void (*body)(void *, int32_t, int64_t);
  void *context;
};

void work(void *argument) {
  Job &job = *static_cast<Job *>(argument);
  const int32_t worker = job.next_worker.fetch_add(1);
  for (int64_t item; (item = job.next_item.fetch_add(1)) < job.items;) job.body(job.context, worker, item);
}

}  // namespace

void run_parallel(int32_t threads, int64_t items, void (*body)(void *, int32_t, int64_t), void *context) {
  if (threads > items) threads = static_cast<int32_t>(items);
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) body(context, 0, item);
    return;
  }
  Job job;
  job.items = items;
  job.body = body;
  job.context = context;
  const GompParallel shared = gomp_parallel.load();
  // After a fork, the runtime counts on threads that the child does not have, and would wait for them forever.
  if (shared != nullptr && gomp_process.load() == process_id()) {
    shared(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    others.reserve(static_cast<size_t>(threads - 1));
    for (int32_t i = 1; i < threads; ++i) others.emplace_back(work, &job);
  } catch (const std::system_error &) {  // no more threads: the existing ones do the work
  } catch (const std::bad_alloc &) {
  }
  work(&job);
  for (std::thread &other : others) other.join();
}

void *allocate(size_t bytes) {
#if defined(__linux__)
  constexpr size_t kHuge = size_t{1} << 21;
#else
  constexpr size_t kHuge = 64;
#endif
  const size_t alignment = bytes >= 2 * kHuge ? kHuge : 64;
  if (bytes > SIZE_MAX - alignment) return nullptr;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void *memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes == 0 ? alignment : bytes) != 0) return nullptr;
#if defined(__linux__)
  if (alignment == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);  // saves thousands of page faults per call
#endif
  return memory;
}

void release(void *memory) { std::free(memory); }

}  // namespace atedm

extern "C" void atedm_set_openmp(void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
  atedm::gomp_process = atedm::process_id();
  atedm::gomp_parallel = parallel;
}
