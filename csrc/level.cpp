// Every kernel that gains from a level's instructions. Compiled once for each level with -DATEDM_LEVEL=… and
// -DATEDM_NAMESPACE=…, all in one go: that is quicker than file by file.
#include "attention_column_sums.cpp"
#include "weighted_page_rank.cpp"
#include "weighted_page_rank_cross.cpp"
#include "similarity_source.cpp"
#include "recover_feature_map.cpp"

namespace atedm {
namespace ATEDM_NAMESPACE {
extern const Kernels kKernels;
const Kernels kKernels = {attention_column_sums, weighted_page_rank, weighted_page_rank_cross, similarity_source,
                          recover_feature_map};
}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
