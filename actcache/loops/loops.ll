; Loops that NumPy has no fast way for. See compiled.py.

; Rows to their slots of a window, %stride bytes apart, around the caches; those %chosen, or the first ones.
define void @scatter(ptr %window, i64 %stride, ptr %slots, ptr %rows, i64 %row_bytes, ptr %chosen, i64 %n) {
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
  fence seq_cst
  ret void
}

; Where the rows of %n_members members go, see order.py: %slot of each. %place says which slot is the i-th in order of keys.
; A key is partition, hash, row number, from the upper bits down. Its bits from %shift on say in which bucket it belongs.
define void @permute(i64 %key, ptr %n_rows, ptr %partition, i64 %n_members, i64 %row_bits, i64 %partition_bits,
                     ptr %keys, ptr %sorted, ptr %ends, i64 %n_buckets, i64 %shift, ptr %place, ptr %slot) {
entry:
  %low_bits = add i64 %row_bits, %partition_bits
  %partition_at = sub i64 64, %partition_bits
  %row_unit = shl i64 1, %row_bits
  %row_mask = sub i64 %row_unit, 1
  br label %member
member:
  %m = phi i64 [ 0, %entry ], [ %m.next, %member.end ]
  %n = phi i64 [ 0, %entry ], [ %number, %member.end ]
  %is_member = icmp ult i64 %m, %n_members
  br i1 %is_member, label %rows, label %count.end
rows:
  %rows.at = getelementptr i64, ptr %n_rows, i64 %m
  %rows.n = load i64, ptr %rows.at
  %end = add i64 %n, %rows.n
  %partition.of = getelementptr i64, ptr %partition, i64 %m
  %partition.m = load i64, ptr %partition.of
  %upper = shl i64 %partition.m, %partition_at
  br label %row
row:
  %number = phi i64 [ %n, %rows ], [ %number.next, %hash ]
  %is_row = icmp ult i64 %number, %end
  br i1 %is_row, label %hash, label %member.end
hash:
  %h.0 = mul i64 %number, -7046029254386353131
  %h.1 = add i64 %h.0, %key
  %h.2 = call i64 @mix(i64 %h.1)
  %h.3 = xor i64 %h.2, %key
  %h.4 = call i64 @mix(i64 %h.3)
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
  br i1 %d.again, label %deal, label %insert
insert:
  %i = phi i64 [ 0, %deal ], [ %i.next, %insert.end ]
  %i.at = getelementptr i64, ptr %sorted, i64 %i
  %i.key = load i64, ptr %i.at
  br label %step
step:
  %j = phi i64 [ %i, %insert ], [ %j.less, %move ]
  %j.at = getelementptr i64, ptr %sorted, i64 %j
  %is_first = icmp eq i64 %j, 0
  br i1 %is_first, label %insert.end, label %compare
compare:
  %j.less = sub i64 %j, 1
  %j.less.at = getelementptr i64, ptr %sorted, i64 %j.less
  %left = load i64, ptr %j.less.at
  %is_larger = icmp ugt i64 %left, %i.key
  br i1 %is_larger, label %move, label %insert.end
move:
  store i64 %left, ptr %j.at
  br label %step
insert.end:
  store i64 %i.key, ptr %j.at
  %i.next = add i64 %i, 1
  %i.again = icmp ult i64 %i.next, %n
  br i1 %i.again, label %insert, label %give
give:
  %g = phi i64 [ 0, %insert.end ], [ %g.next, %give ]
  %g.at = getelementptr i64, ptr %sorted, i64 %g
  %g.key = load i64, ptr %g.at
  %g.row = and i64 %g.key, %row_mask
  %g.place.at = getelementptr i64, ptr %place, i64 %g
  %g.place = load i64, ptr %g.place.at
  %g.slot = getelementptr i64, ptr %slot, i64 %g.row
  store i64 %g.place, ptr %g.slot
  %g.next = add i64 %g, 1
  %g.again = icmp ult i64 %g.next, %n
  br i1 %g.again, label %give, label %done
done:
  ret void
}

; In each slot, the number of its row and the layer of its member: members have %n_rows one after the other, from %first on.
define void @tell(ptr %n_rows, ptr %first, ptr %layer, i64 %n_members, ptr %slot, ptr %rows, ptr %layers) {
entry:
  br label %member
member:
  %m = phi i64 [ 0, %entry ], [ %m.next, %member.end ]
  %k.0 = phi i64 [ 0, %entry ], [ %k, %member.end ]
  %is_member = icmp ult i64 %m, %n_members
  br i1 %is_member, label %of_member, label %done
of_member:
  %n.at = getelementptr i64, ptr %n_rows, i64 %m
  %n = load i64, ptr %n.at
  %end = add i64 %k.0, %n
  %first.at = getelementptr i64, ptr %first, i64 %m
  %first.m = load i64, ptr %first.at
  %less = sub i64 %first.m, %k.0
  %layer.at = getelementptr i64, ptr %layer, i64 %m
  %layer.m = load i64, ptr %layer.at
  br label %row
row:
  %k = phi i64 [ %k.0, %of_member ], [ %k.next, %say ]
  %is_row = icmp ult i64 %k, %end
  br i1 %is_row, label %say, label %member.end
say:
  %slot.at = getelementptr i64, ptr %slot, i64 %k
  %slot.k = load i64, ptr %slot.at
  %number = add i64 %less, %k
  %rows.at = getelementptr i64, ptr %rows, i64 %slot.k
  store i64 %number, ptr %rows.at
  %layers.at = getelementptr i64, ptr %layers, i64 %slot.k
  store i64 %layer.m, ptr %layers.at
  %k.next = add i64 %k, 1
  br label %row
member.end:
  %m.next = add i64 %m, 1
  br label %member
done:
  ret void
}

; The mixer of keyed.py.
define internal i64 @mix(i64 %x) {
entry:
  %x.30 = lshr i64 %x, 30
  %a = xor i64 %x, %x.30
  %b = mul i64 %a, -4658895280553007687
  %b.27 = lshr i64 %b, 27
  %c = xor i64 %b, %b.27
  %d = mul i64 %c, -7723592293110705685
  %d.31 = lshr i64 %d, 31
  %e = xor i64 %d, %d.31
  ret i64 %e
}
!0 = !{i32 1}
