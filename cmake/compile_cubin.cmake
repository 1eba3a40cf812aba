# One cubin and, beside it, the report of ptxas (registers, spills, shared memory) as CUBIN.ptxas.txt.
# Run as `cmake -DNVCC= -DVERSION= -DSOURCE= -DCUBIN= -DINCLUDES= -DFLAGS= -P`; a script, since the report
# must be kept and the compiler's words still be seen where it fails.  Where FLASHMOE_CUBIN_CACHE names a
# folder, what was compiled before of the same text by the same compiler comes from there.
set(options -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a ${FLAGS})

# Name and content of every file that SOURCE is compiled from, headers of CUDA and NVSHMEM too.
function(flashmoe_text_of source out)
  execute_process(
    COMMAND "${NVCC}" ${options} ${INCLUDES} -M -MT "${CUBIN}" -MF "${CUBIN}.d" "${source}"
    OUTPUT_VARIABLE said
    ERROR_VARIABLE said
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "nvcc failed on ${source}:\n${said}")
  endif()
  file(READ "${CUBIN}.d" files)
  string(REGEX REPLACE "^[^\n]* : " "" files "${files}")
  string(REGEX REPLACE "\\\\\n" " " files "${files}")
  string(REGEX MATCHALL "([^ \n\\]|\\\\.)+" files "${files}")
  if(NOT files)
    message(FATAL_ERROR "nvcc names no file that ${source} is compiled from")
  endif()
  set(text "")
  foreach(file IN LISTS files)
    string(REGEX REPLACE "\\\\(.)" "\\1" file "${file}")
    cmake_path(GET file FILENAME name)
    file(SHA256 "${file}" hash)
    string(APPEND text " ${name} ${hash}")
  endforeach()
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

set(cached "")
if(NOT "$ENV{FLASHMOE_CUBIN_CACHE}" STREQUAL "")
  flashmoe_text_of("${SOURCE}" what)
  file(SHA256 "${CMAKE_CURRENT_LIST_FILE}" script)
  string(APPEND what " ${VERSION} ${options} ${script}")
  if(FLAGS MATCHES "-lineinfo")
    string(APPEND what " ${SOURCE}") # it is in the cubin
  endif()
  string(SHA256 what "${what}")
  cmake_path(GET CUBIN FILENAME name)
  set(cached "$ENV{FLASHMOE_CUBIN_CACHE}/${what}-${name}")
  if(EXISTS "${cached}")
    file(COPY_FILE "${cached}.ptxas.txt" "${CUBIN}.ptxas.txt")
    file(COPY_FILE "${cached}" "${CUBIN}")
    message("${name} as it was compiled before")
    return()
  endif()
endif()
execute_process(
  COMMAND
    "${NVCC}" ${options} -cubin -Xptxas -v --split-compile=0 ${INCLUDES} -MD -MF "${CUBIN}.d" -o
    "${CUBIN}" "${SOURCE}"
  OUTPUT_VARIABLE report
  ERROR_VARIABLE report
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "nvcc failed on ${SOURCE}:\n${report}")
endif()
# A kernel's warps give registers away by setmaxnreg, which a function that is called would not know: only
# choose_any(), which is called before they do, may be one.
string(REGEX MATCHALL "Function properties for [^\n]*" functions "${report}")
list(FILTER functions EXCLUDE REGEX "choose_any")
string(REGEX MATCHALL "Compiling entry function '[^\n]*" entries "${report}")
list(LENGTH functions compiled)
list(LENGTH entries asked)
if(NOT compiled EQUAL asked)
  file(REMOVE "${CUBIN}")
  message(FATAL_ERROR "${SOURCE}: a function is called where all must be inlined:\n${report}")
endif()
# ptxas says in a remark alone that it has put a wait behind each product of a kernel.
if(report MATCHES "wgmma[^\n]*serialized[^\n]*")
  file(REMOVE "${CUBIN}")
  message(FATAL_ERROR "${SOURCE}: ${CMAKE_MATCH_0}")
endif()
file(WRITE "${CUBIN}.ptxas.txt" "${report}")
string(REGEX MATCHALL "[^\n]*warning[^\n]*" warnings "${report}")
foreach(warning IN LISTS warnings)
  message("${warning}")
endforeach()
if(cached)
  # The cubin last and at once: what another build finds is whole.
  file(MAKE_DIRECTORY "$ENV{FLASHMOE_CUBIN_CACHE}")
  string(RANDOM LENGTH 8 suffix)
  file(COPY_FILE "${CUBIN}.ptxas.txt" "${cached}.${suffix}")
  file(RENAME "${cached}.${suffix}" "${cached}.ptxas.txt")
  file(COPY_FILE "${CUBIN}" "${cached}.${suffix}")
  file(RENAME "${cached}.${suffix}" "${cached}")
endif()
