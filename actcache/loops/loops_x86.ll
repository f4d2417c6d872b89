; Loops that need an instruction of one kind of processor: crc32. They follow those of loops.ll and a @crc32c, which declare what these use too.

; Chunks from files to their slots: read, compared, scattered. Says how many; the next one is not as it should be, or %n.
; %work, for each: file (-1: it is in memory, first byte says where), first byte, bytes, crc32c, slots, rows chosen (0: the first), slots in number, where the file is
; mapped (0: nowhere) and where the map ends. What is mapped is read there, unless the system says that it can't be; else it
; is copied to %memory, to where `lead` in store/local.py says. It is compared while it is put: rows of a chunk that is not as it should be may have been put. Pages are given
; back after it; the system may map pages around those it is asked for, as far as the next multiple of 2 MiB.
define i64 @bring(ptr %work, i64 %n, ptr %memory, ptr %window, i64 %stride, i64 %row_bytes, ptr %shift, ptr %cycles) {
entry:
  br label %chunk
chunk:
  %i = phi i64 [ 0, %entry ], [ %i.next, %next ]
  %read = phi i64 [ 0, %entry ], [ %read.next, %next ]
  %compared = phi i64 [ 0, %entry ], [ %compared.next, %next ]
  %scattered = phi i64 [ 0, %entry ], [ %scattered.next, %next ]
  %is_more = icmp ult i64 %i, %n
  br i1 %is_more, label %get, label %done
get:
  %one = getelementptr [9 x i64], ptr %work, i64 %i
  %file.wide = load i64, ptr %one
  %file = trunc i64 %file.wide to i32
  %first.at = getelementptr i64, ptr %one, i64 1
  %first = load i64, ptr %first.at
  %bytes.at = getelementptr i64, ptr %one, i64 2
  %bytes = load i64, ptr %bytes.at
  %crc.at = getelementptr i64, ptr %one, i64 3
  %crc = load i64, ptr %crc.at
  %slots.at = getelementptr i64, ptr %one, i64 4
  %slots = load ptr, ptr %slots.at
  %chosen.at = getelementptr i64, ptr %one, i64 5
  %chosen = load ptr, ptr %chosen.at
  %slots.n.at = getelementptr i64, ptr %one, i64 6
  %slots.n = load i64, ptr %slots.n.at
  %map.at = getelementptr i64, ptr %one, i64 7
  %map = load i64, ptr %map.at
  %map.end.at = getelementptr i64, ptr %one, i64 8
  %map.end = load i64, ptr %map.end.at
  %is_given = icmp eq i32 %file, -1
  br i1 %is_given, label %put.given, label %find
put.given:
  %given.at = inttoptr i64 %first to ptr
  %cycle.g0 = call i64 @llvm.readcyclecounter()
  %crc.given = call i32 @put_comparing(ptr %window, i64 %stride, ptr %slots, ptr %given.at, i64 %row_bytes, ptr %chosen, i64 %slots.n, i64 %bytes, ptr %shift)
  %cycle.g1 = call i64 @llvm.readcyclecounter()
  %putting.given = sub i64 %cycle.g1, %cycle.g0
  %crc.given.wide = zext i32 %crc.given to i64
  %is_given.right = icmp eq i64 %crc.given.wide, %crc
  br i1 %is_given.right, label %next, label %done
find:
  %mapped.n = add i64 %map, %first
  %behind = add i64 %mapped.n, %bytes
  %is_in = icmp ule i64 %behind, %map.end
  %is_map = icmp ne i64 %map, 0
  %is_mapped = and i1 %is_map, %is_in
  br i1 %is_mapped, label %populate, label %get.copy
populate:
  %mapped = inttoptr i64 %mapped.n to ptr
  %page.n = and i64 %mapped.n, -4096
  %page = inttoptr i64 %page.n to ptr
  %pages.bytes = sub i64 %behind, %page.n
  %cycle.m0 = call i64 @llvm.readcyclecounter()
  %refused = call i32 @madvise(ptr %page, i64 %pages.bytes, i32 22)
  %cycle.m1 = call i64 @llvm.readcyclecounter()
  %is_there = icmp eq i32 %refused, 0
  br i1 %is_there, label %put.mapped, label %get.copy
put.mapped:
  %crc.mapped = call i32 @put_comparing(ptr %window, i64 %stride, ptr %slots, ptr %mapped, i64 %row_bytes, ptr %chosen, i64 %slots.n, i64 %bytes, ptr %shift)
  %cycle.m2 = call i64 @llvm.readcyclecounter()
  %around.begin = and i64 %mapped.n, -2097152
  %around.first = call i64 @llvm.umax.i64(i64 %around.begin, i64 %map)
  %around.up = add i64 %behind, 2097151
  %around.end = and i64 %around.up, -2097152
  %around.last = call i64 @llvm.umin.i64(i64 %around.end, i64 %map.end)
  %around.bytes = sub i64 %around.last, %around.first
  %around = inttoptr i64 %around.first to ptr
  %given = call i32 @madvise(ptr %around, i64 %around.bytes, i32 4)
  %cycle.m3 = call i64 @llvm.readcyclecounter()
  %mapping.begun = sub i64 %cycle.m1, %cycle.m0
  %mapping.ended = sub i64 %cycle.m3, %cycle.m2
  %mapping = add i64 %mapping.begun, %mapping.ended
  %putting = sub i64 %cycle.m2, %cycle.m1
  %crc.mapped.wide = zext i32 %crc.mapped to i64
  %is_mapped.right = icmp eq i64 %crc.mapped.wide, %crc
  br i1 %is_mapped.right, label %next, label %done
get.copy:
  %line.begun = add i64 %first, 63
  %line = lshr i64 %line.begun, 6
  %line.next = add i64 %line, 1
  %lead.far = shl i64 %line.next, 6
  %lead = and i64 %lead.far, 4095
  %to = getelementptr i8, ptr %memory, i64 %lead
  %cycle.0 = call i64 @llvm.readcyclecounter()
  %got = call i64 @pread(i32 %file, ptr %to, i64 %bytes, i64 %first)
  %is_all = icmp eq i64 %got, %bytes
  br i1 %is_all, label %compare, label %done
compare:
  %cycle.1 = call i64 @llvm.readcyclecounter()
  %crc.found = call i32 @crc32c(ptr %to, i64 %bytes, ptr %shift, i32 0)
  %crc.wide = zext i32 %crc.found to i64
  %is_right = icmp eq i64 %crc.wide, %crc
  br i1 %is_right, label %put, label %done
put:
  %cycle.2 = call i64 @llvm.readcyclecounter()
  call void @scatter(ptr %window, i64 %stride, ptr %slots, ptr %to, i64 %row_bytes, ptr %chosen, i64 %slots.n)
  %cycle.3 = call i64 @llvm.readcyclecounter()
  %copying = sub i64 %cycle.1, %cycle.0
  %comparing = sub i64 %cycle.2, %cycle.1
  %scattering = sub i64 %cycle.3, %cycle.2
  br label %next
next:
  %read.took = phi i64 [ %copying, %put ], [ %mapping, %put.mapped ], [ 0, %put.given ]
  %compared.took = phi i64 [ %comparing, %put ], [ 0, %put.mapped ], [ 0, %put.given ]
  %scattered.took = phi i64 [ %scattering, %put ], [ %putting, %put.mapped ], [ %putting.given, %put.given ]
  %read.next = add i64 %read, %read.took
  %compared.next = add i64 %compared, %compared.took
  %scattered.next = add i64 %scattered, %scattered.took
  %i.next = add i64 %i, 1
  br label %chunk
done:
  store i64 %read, ptr %cycles
  %compared.to = getelementptr i64, ptr %cycles, i64 1
  store i64 %compared, ptr %compared.to
  %scattered.to = getelementptr i64, ptr %cycles, i64 2
  store i64 %scattered, ptr %scattered.to
  ret i64 %i
}

; As @scatter, but for the fence, of rows that are compared too: says the crc32c of %bytes from %rows on. What is not in the
; caches is read from memory once: 2 KiB at a time are compared and then put, what lies 4 KiB further on its way meanwhile.
define internal i32 @put_comparing(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n,
                                   i64 %bytes, ptr %shift) {
entry:
  %is_some = icmp ne ptr %chosen, null
  br i1 %is_some, label %some, label %begin
some:
  %crc.some = call i32 @crc32c(ptr %rows, i64 %bytes, ptr %shift, i32 0)
  call void @place(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n)
  fence seq_cst
  ret i32 %crc.some
begin:
  %fitting = udiv i64 2048, %row_bytes
  %most = call i64 @llvm.umax.i64(i64 %fitting, i64 1)
  br label %piece
piece:
  %i = phi i64 [ 0, %begin ], [ %i.next, %put ]
  %crc = phi i32 [ 0, %begin ], [ %crc.next, %put ]
  %left = sub i64 %n, %i
  %is_more = icmp ne i64 %left, 0
  br i1 %is_more, label %fetch, label %rest
fetch:
  %m = call i64 @llvm.umin.i64(i64 %left, i64 %most)
  %from = mul i64 %i, %row_bytes
  %m.bytes = mul i64 %m, %row_bytes
  %data = getelementptr i8, ptr %rows, i64 %from
  %later = getelementptr i8, ptr %data, i64 4096
  br label %line
line:
  %at = phi i64 [ 0, %fetch ], [ %at.next, %line ]
  %later.line = getelementptr i8, ptr %later, i64 %at
  call void @llvm.prefetch.p0(ptr %later.line, i32 0, i32 2, i32 1)
  %at.next = add i64 %at, 64
  %more.lines = icmp ult i64 %at.next, %m.bytes
  br i1 %more.lines, label %line, label %put
put:
  %crc.next = call i32 @crc32c(ptr %data, i64 %m.bytes, ptr %shift, i32 %crc)
  %slots.i = getelementptr i64, ptr %slots, i64 %i
  call void @place(ptr %window, i64 %stride, ptr %slots.i, ptr %data, i64 %row_bytes, ptr null, i64 %m)
  %i.next = add i64 %i, %m
  br label %piece
rest:
  fence seq_cst
  %put.bytes = mul i64 %n, %row_bytes
  %rest.data = getelementptr i8, ptr %rows, i64 %put.bytes
  %rest.bytes = sub i64 %bytes, %put.bytes
  %crc.all = call i32 @crc32c(ptr %rest.data, i64 %rest.bytes, ptr %shift, i32 %crc)
  ret i32 %crc.all
}
declare i64 @llvm.x86.sse42.crc32.64.64(i64, i64)
declare i32 @llvm.x86.sse42.crc32.32.8(i32, i8)
declare i64 @llvm.readcyclecounter()
declare i64 @pread(i32, ptr, i64, i64)
declare i32 @madvise(ptr, i64, i32)
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)
