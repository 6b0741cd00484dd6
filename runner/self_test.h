// `dreamedge-run --self-test ARTIFACT`: the recorded calls on this device, judged by the artifact's own bounds.
#pragma once

#include <filesystem>
#include <optional>

#include "program.h"

namespace dreamedge {

// The figures go to stdout, a line each, or with as_json as one object.
//
// Throws `Error`: Exit::artifact for files that were changed, a program that fails, or a figure out of its bounds.
void self_test(const std::filesystem::path& artifact, bool as_json, Load load, std::optional<int64_t> threads);

}  // namespace dreamedge
