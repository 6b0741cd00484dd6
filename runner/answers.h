// The commands that write: a prompt, lines of prompts, or ids.
#pragma once

#include "arguments.h"
#include "program.h"

namespace dreamedge {

// One prompt, from the command line or stdin: the answer on stdout, what it took on stderr.
void answer_prompt(const Arguments& arguments, const Loading& loading);

// JSON lines in, JSON lines out. A line that cannot be answered is told, the others are answered; then it throws
// `Error` (Exit::usage).
void answer_lines(const Arguments& arguments, const Loading& loading);

// Token ids in, token ids out, of a folder or a .pte; with --history as one JSON object.
void answer_ids(const Arguments& arguments, const Loading& loading);

}  // namespace dreamedge
