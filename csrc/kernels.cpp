// Every kernel that gains from wider instructions, compiled once for each ISA with -DATEDM_ISA=… and
// -DATEDM_NAMESPACE=…. One translation unit compiles faster than five.
#include "attention_column_sums.cpp"
#include "weighted_page_rank.cpp"
#include "weighted_page_rank_cross.cpp"
#include "similarity_source.cpp"
#include "recover_feature_map.cpp"
#include "update_feature_map.cpp"

namespace atedm {
namespace ATEDM_NAMESPACE {
extern const Kernels kKernels;
const Kernels kKernels = {attention_column_sums, weighted_page_rank, weighted_page_rank_cross, similarity_source,
                          recover_feature_map,   update_feature_map};
}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
