// The memory that a program has planned.
#pragma once

#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method_meta.h>
#include <sys/mman.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <vector>

#include "errors.h"

namespace dreamedge {

// For its caches, activations and logits. Its pages are zeros, and not there before they are written: most programs are
// asked for less than the longest call.
class Planned {
  public:
    // Throws `Error`: Exit::resource, or Exit::artifact for a plan that is none.
    Planned(const executorch::runtime::MethodMeta& method, const std::filesystem::path& file) {
        for (size_t i = 0; i < method.num_memory_planned_buffers(); ++i) {
            const auto planned = method.memory_planned_buffer_size(i);
            if (!planned.ok() || *planned < 0)
                artifact_error(file.string() + ": damaged: memory of no size is planned");
            const auto n_bytes = static_cast<size_t>(*planned);
            void* start = mmap(nullptr, std::max<size_t>(1, n_bytes), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (start == MAP_FAILED)
                throw Error(Exit::resource, file.string() + ": too little memory for this program");
            spans_.emplace_back(static_cast<uint8_t*>(start), n_bytes);
        }
        allocator_.emplace(executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(spans_.data(), spans_.size()));
    }
    Planned(const Planned&) = delete;
    ~Planned() {
        for (const auto& span : spans_) munmap(span.data(), std::max<size_t>(1, span.size()));
    }

    executorch::runtime::HierarchicalAllocator* allocator() { return &*allocator_; }

  private:
    std::vector<executorch::runtime::Span<uint8_t>> spans_;
    std::optional<executorch::runtime::HierarchicalAllocator> allocator_;
};

}  // namespace dreamedge
