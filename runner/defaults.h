// How a checkpoint asks to be written with: its own generation_config.json, as runtime/defaults.py reads it.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "arguments.h"

namespace dreamedge {

// The options that it sets, as somebody would type them, but for those that a rule of `given` makes void. Empty without
// the file. Throws `Error` (Exit::artifact).
std::map<std::string, std::string> own_defaults(const std::filesystem::path& folder, const Arguments& given);

}  // namespace dreamedge
