# One cubin and, beside it, the report of ptxas (registers, spills, shared memory) as CUBIN.ptxas.txt.
# Run as `cmake -DNVCC= -DVERSION= -DSOURCE= -DCUBIN= -DINCLUDES= -DFLAGS= -P`; a script, since the report
# must be kept and the compiler's words still be seen where it fails.  Where FLASHMOE_CUBIN_CACHE names a
# folder, what was compiled before of the same sources by the same compiler comes from there.
set(options -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -cubin -Xptxas -v ${FLAGS})
set(cached "")
if(NOT "$ENV{FLASHMOE_CUBIN_CACHE}" STREQUAL "")
  cmake_path(GET SOURCE PARENT_PATH device)
  file(GLOB headers "${device}/*.h" "${device}/../core/*.h")
  set(what "${VERSION} ${options}")
  foreach(file IN LISTS SOURCE headers)
    file(SHA256 "${file}" hash)
    string(APPEND what " ${hash}")
  endforeach()
  string(SHA256 what "${what}")
  cmake_path(GET CUBIN FILENAME name)
  set(cached "$ENV{FLASHMOE_CUBIN_CACHE}/${what}-${name}")
  if(EXISTS "${cached}" AND EXISTS "${cached}.ptxas.txt")
    file(COPY_FILE "${cached}" "${CUBIN}")
    file(COPY_FILE "${cached}.ptxas.txt" "${CUBIN}.ptxas.txt")
    list(JOIN headers " " headers)
    file(WRITE "${CUBIN}.d" "${CUBIN}: ${SOURCE} ${headers}\n")
    message("${name} as it was compiled before")
    return()
  endif()
endif()
execute_process(
  COMMAND
    "${NVCC}" ${options} --split-compile=0 ${INCLUDES} -MD -MF "${CUBIN}.d" -o "${CUBIN}" "${SOURCE}"
  OUTPUT_VARIABLE report
  ERROR_VARIABLE report
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "nvcc failed on ${SOURCE}:\n${report}")
endif()
# A kernel's warps give registers away by setmaxnreg, which a function that is called would not know.
string(REGEX MATCHALL "Function properties for [^\n]*" functions "${report}")
string(REGEX MATCHALL "Compiling entry function '[^\n]*" entries "${report}")
list(LENGTH functions compiled)
list(LENGTH entries asked)
if(NOT compiled EQUAL asked)
  file(REMOVE "${CUBIN}")
  message(FATAL_ERROR "${SOURCE}: a function is called where all must be inlined:\n${report}")
endif()
file(WRITE "${CUBIN}.ptxas.txt" "${report}")
string(REGEX MATCHALL "[^\n]*warning[^\n]*" warnings "${report}")
foreach(warning IN LISTS warnings)
  message("${warning}")
endforeach()
if(cached)
  file(MAKE_DIRECTORY "$ENV{FLASHMOE_CUBIN_CACHE}")
  file(COPY_FILE "${CUBIN}.ptxas.txt" "${cached}.ptxas.txt")
  file(COPY_FILE "${CUBIN}" "${cached}")
endif()
