; Loops that NumPy has no fast way for. See compiled.py.

; Rows to their slots of a window, %stride bytes apart, around the caches; those %chosen, or the first ones.
define void @scatter(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n) {
entry:
  call void @place(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n)
  fence seq_cst
  ret void
}

; The same, but other threads may see something else until the next fence.
define internal void @place(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n) {
entry:
  %is_empty = icmp eq i64 %n, 0
  %takes_first = icmp eq ptr %chosen, null
  br i1 %is_empty, label %done, label %row
row:
  %i = phi i64 [ 0, %entry ], [ %i.next, %row.end ]
  br i1 %takes_first, label %known, label %look
look:
  %chosen.at = getelementptr i64, ptr %chosen, i64 %i
  %looked = load i64, ptr %chosen.at
  br label %known
known:
  %from = phi i64 [ %i, %row ], [ %looked, %look ]
  %slot.at = getelementptr i64, ptr %slots, i64 %i
  %slot = load i64, ptr %slot.at
  %target.offset = mul i64 %slot, %stride
  %target = getelementptr i8, ptr %window, i64 %target.offset
  %source.offset = mul i64 %from, %row_bytes
  %source = getelementptr i8, ptr %rows, i64 %source.offset
  br label %line
line:
  %at = phi i64 [ 0, %known ], [ %at.next, %line ]
  %source.line = getelementptr i8, ptr %source, i64 %at
  %value = load <8 x i64>, ptr %source.line, align 1
  %target.line = getelementptr i8, ptr %target, i64 %at
  store <8 x i64> %value, ptr %target.line, align 64, !nontemporal !0
  %at.next = add i64 %at, 64
  %more.lines = icmp ult i64 %at.next, %row_bytes
  br i1 %more.lines, label %line, label %row.end
row.end:
  %i.next = add i64 %i, 1
  %more.rows = icmp ult i64 %i.next, %n
  br i1 %more.rows, label %row, label %done
done:
  ret void
}

; Where the rows of %n_members members go, see order.py: %slot of each. %place says which slot is the i-th in order of keys.
; Members have rows up to %end, counted one after the other. Unless %rows is null, each slot is told its row number (in %rows:
; the row plus its member's %less) and its member's layer (in %layers); %of_block is memory for a member per 64 rows.
; A key is partition, hash, row number, from the upper bits down. Bits from %shift on say in which bucket it belongs, the 9
; below these (hashes are mixed as in keyed.py) in which part of it: a bucket stays in the processor's first cache while it is sorted. %within is memory for 512.
define void @permute(i64 %key, ptr %end, ptr %partition, i64 %n_members, i64 %row_bits, i64 %partition_bits,
                     ptr %keys, ptr %sorted, ptr %ends, i64 %n_buckets, i64 %shift, ptr %within, ptr %place, ptr %slot,
                     ptr %less, ptr %layer, ptr %of_block, ptr %rows, ptr %layers) {
entry:
  %low_bits = add i64 %row_bits, %partition_bits
  %partition_at = sub i64 64, %partition_bits
  %row_unit = shl i64 1, %row_bits
  %row_mask = sub i64 %row_unit, 1
  %shift.within = sub i64 %shift, 9
  %tells = icmp ne ptr %rows, null
  br label %member
member:
  %m = phi i64 [ 0, %entry ], [ %m.next, %member.end ]
  %n = phi i64 [ 0, %entry ], [ %number, %member.end ]
  %is_member = icmp ult i64 %m, %n_members
  br i1 %is_member, label %rows.of, label %count.end
rows.of:
  %end.at = getelementptr i64, ptr %end, i64 %m
  %end.m = load i64, ptr %end.at
  %partition.of = getelementptr i64, ptr %partition, i64 %m
  %partition.m = load i64, ptr %partition.of
  %upper = shl i64 %partition.m, %partition_at
  br label %row
row:
  %number = phi i64 [ %n, %rows.of ], [ %number.next, %count ]
  %is_row = icmp ult i64 %number, %end.m
  br i1 %is_row, label %hash, label %member.end
hash:
  %h.0 = mul i64 %number, -7046029254386353131
  %h.1 = add i64 %h.0, %key
  %h.2.30 = lshr i64 %h.1, 30
  %h.2.a = xor i64 %h.1, %h.2.30
  %h.2.b = mul i64 %h.2.a, -4658895280553007687
  %h.2.27 = lshr i64 %h.2.b, 27
  %h.2.c = xor i64 %h.2.b, %h.2.27
  %h.2.d = mul i64 %h.2.c, -7723592293110705685
  %h.2.31 = lshr i64 %h.2.d, 31
  %h.2 = xor i64 %h.2.d, %h.2.31
  %h.3 = xor i64 %h.2, %key
  %h.4.30 = lshr i64 %h.3, 30
  %h.4.a = xor i64 %h.3, %h.4.30
  %h.4.b = mul i64 %h.4.a, -4658895280553007687
  %h.4.27 = lshr i64 %h.4.b, 27
  %h.4.c = xor i64 %h.4.b, %h.4.27
  %h.4.d = mul i64 %h.4.c, -7723592293110705685
  %h.4.31 = lshr i64 %h.4.d, 31
  %h.4 = xor i64 %h.4.d, %h.4.31
  %h.5 = lshr i64 %h.4, %low_bits
  %h.6 = shl i64 %h.5, %row_bits
  %h.7 = or i64 %h.6, %number
  %h.key = or i64 %h.7, %upper
  %h.at = getelementptr i64, ptr %keys, i64 %number
  store i64 %h.key, ptr %h.at
  %h.bucket = lshr i64 %h.key, %shift
  %h.end = getelementptr i64, ptr %ends, i64 %h.bucket
  %h.count = load i64, ptr %h.end
  %h.more = add i64 %h.count, 1
  store i64 %h.more, ptr %h.end
  %number.next = add i64 %number, 1
  %in_block = and i64 %number, 63
  %is_first = icmp eq i64 %in_block, 0
  %notes = and i1 %is_first, %tells
  br i1 %notes, label %note, label %count
note:
  %block = lshr i64 %number, 6
  %block.at = getelementptr i64, ptr %of_block, i64 %block
  store i64 %m, ptr %block.at
  br label %count
count:
  br label %row
member.end:
  %m.next = add i64 %m, 1
  br label %member
count.end:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %begin
begin:
  %b = phi i64 [ 0, %count.end ], [ %b.next, %begin ]
  %before = phi i64 [ 0, %count.end ], [ %before.next, %begin ]
  %b.end = getelementptr i64, ptr %ends, i64 %b
  %b.count = load i64, ptr %b.end
  store i64 %before, ptr %b.end
  %before.next = add i64 %before, %b.count
  %b.next = add i64 %b, 1
  %b.again = icmp ult i64 %b.next, %n_buckets
  br i1 %b.again, label %begin, label %deal
deal:
  %d = phi i64 [ 0, %begin ], [ %d.next, %deal ]
  %d.at = getelementptr i64, ptr %keys, i64 %d
  %d.key = load i64, ptr %d.at
  %d.bucket = lshr i64 %d.key, %shift
  %d.end = getelementptr i64, ptr %ends, i64 %d.bucket
  %d.place = load i64, ptr %d.end
  %d.to = getelementptr i64, ptr %sorted, i64 %d.place
  store i64 %d.key, ptr %d.to
  %d.filled = add i64 %d.place, 1
  store i64 %d.filled, ptr %d.end
  %d.next = add i64 %d, 1
  %d.again = icmp ult i64 %d.next, %n
  br i1 %d.again, label %deal, label %bucket
bucket:
  %u = phi i64 [ 0, %deal ], [ %u.next, %bucket.end ]
  %start = phi i64 [ 0, %deal ], [ %stop, %bucket.end ]
  %u.end = getelementptr i64, ptr %ends, i64 %u
  %stop = load i64, ptr %u.end
  %u.is_empty = icmp eq i64 %start, %stop
  br i1 %u.is_empty, label %bucket.end, label %clear
clear:
  call void @llvm.memset.p0.i64(ptr %within, i8 0, i64 4096, i1 false)
  br label %w.count
w.count:
  %wc = phi i64 [ %start, %clear ], [ %wc.next, %w.count ]
  %wc.at = getelementptr i64, ptr %sorted, i64 %wc
  %wc.key = load i64, ptr %wc.at
  %wc.upper = lshr i64 %wc.key, %shift.within
  %wc.part = and i64 %wc.upper, 511
  %wc.to = getelementptr i64, ptr %within, i64 %wc.part
  %wc.count = load i64, ptr %wc.to
  %wc.more = add i64 %wc.count, 1
  store i64 %wc.more, ptr %wc.to
  %wc.next = add i64 %wc, 1
  %wc.again = icmp ult i64 %wc.next, %stop
  br i1 %wc.again, label %w.count, label %w.begin
w.begin:
  %wb = phi i64 [ 0, %w.count ], [ %wb.next, %w.begin ]
  %wb.before = phi i64 [ %start, %w.count ], [ %wb.after, %w.begin ]
  %wb.at = getelementptr i64, ptr %within, i64 %wb
  %wb.count = load i64, ptr %wb.at
  store i64 %wb.before, ptr %wb.at
  %wb.after = add i64 %wb.before, %wb.count
  %wb.next = add i64 %wb, 1
  %wb.again = icmp ult i64 %wb.next, 512
  br i1 %wb.again, label %w.begin, label %w.deal
w.deal:
  %wd = phi i64 [ %start, %w.begin ], [ %wd.next, %w.deal ]
  %wd.at = getelementptr i64, ptr %sorted, i64 %wd
  %wd.key = load i64, ptr %wd.at
  %wd.upper = lshr i64 %wd.key, %shift.within
  %wd.part = and i64 %wd.upper, 511
  %wd.end = getelementptr i64, ptr %within, i64 %wd.part
  %wd.place = load i64, ptr %wd.end
  %wd.to = getelementptr i64, ptr %keys, i64 %wd.place
  store i64 %wd.key, ptr %wd.to
  %wd.filled = add i64 %wd.place, 1
  store i64 %wd.filled, ptr %wd.end
  %wd.next = add i64 %wd, 1
  %wd.again = icmp ult i64 %wd.next, %stop
  br i1 %wd.again, label %w.deal, label %insert
insert:
  %i = phi i64 [ %start, %w.deal ], [ %i.next, %insert.end ]
  %i.at = getelementptr i64, ptr %keys, i64 %i
  %i.key = load i64, ptr %i.at
  br label %step
step:
  %j = phi i64 [ %i, %insert ], [ %j.less, %move ]
  %j.at = getelementptr i64, ptr %keys, i64 %j
  %j.is_first = icmp eq i64 %j, %start
  br i1 %j.is_first, label %insert.end, label %compare
compare:
  %j.less = sub i64 %j, 1
  %j.less.at = getelementptr i64, ptr %keys, i64 %j.less
  %left = load i64, ptr %j.less.at
  %is_larger = icmp ugt i64 %left, %i.key
  br i1 %is_larger, label %move, label %insert.end
move:
  store i64 %left, ptr %j.at
  br label %step
insert.end:
  store i64 %i.key, ptr %j.at
  %i.next = add i64 %i, 1
  %i.again = icmp ult i64 %i.next, %stop
  br i1 %i.again, label %insert, label %give
give:
  %g = phi i64 [ %start, %insert.end ], [ %g.next, %give.end ]
  %g.at = getelementptr i64, ptr %keys, i64 %g
  %g.key = load i64, ptr %g.at
  %g.row = and i64 %g.key, %row_mask
  %g.place.at = getelementptr i64, ptr %place, i64 %g
  %g.place = load i64, ptr %g.place.at
  %g.slot = getelementptr i64, ptr %slot, i64 %g.row
  store i64 %g.place, ptr %g.slot
  br i1 %tells, label %look, label %give.end
look:
  %g.block = lshr i64 %g.row, 6
  %g.block.at = getelementptr i64, ptr %of_block, i64 %g.block
  %g.earliest = load i64, ptr %g.block.at
  br label %is_it
is_it:
  %g.m = phi i64 [ %g.earliest, %look ], [ %g.m.next, %is_it ]
  %g.m.next = add i64 %g.m, 1
  %g.end.at = getelementptr i64, ptr %end, i64 %g.m
  %g.end = load i64, ptr %g.end.at
  %is_later = icmp uge i64 %g.row, %g.end
  br i1 %is_later, label %is_it, label %tell
tell:
  %less.at = getelementptr i64, ptr %less, i64 %g.m
  %less.m = load i64, ptr %less.at
  %g.number = add i64 %g.row, %less.m
  %rows.at = getelementptr i64, ptr %rows, i64 %g.place
  store i64 %g.number, ptr %rows.at
  %layer.at = getelementptr i16, ptr %layer, i64 %g.m
  %layer.m = load i16, ptr %layer.at
  %layers.at = getelementptr i16, ptr %layers, i64 %g.place
  store i16 %layer.m, ptr %layers.at
  br label %give.end
give.end:
  %g.next = add i64 %g, 1
  %g.again = icmp ult i64 %g.next, %stop
  br i1 %g.again, label %give, label %bucket.end
bucket.end:
  %u.next = add i64 %u, 1
  %u.again = icmp ult i64 %u.next, %n_buckets
  br i1 %u.again, label %bucket, label %done
done:
  ret void
}
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1 immarg)

!0 = !{i32 1}
